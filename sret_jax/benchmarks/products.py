"""The matrix products of a traced program, by shape."""

import collections
import math
import string
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from sret_jax.models.flops import inner_jaxprs, jaxpr_macs, repetitions

ATTENTION, GRADIENTS, MAPS = "attention", "gradients of weights", "linear maps"


class Product(NamedTuple):
    """A `dot_general` of arrays of certain shapes.

    Attributes:
      left, right: shapes of the operands.
      dtype: dtype of both operands.
      dimensions: ((contracted axes of left, of right), (batch axes of left, of right)).
      sums: dtype of the result.
    """

    left: tuple[int, ...]
    right: tuple[int, ...]
    dtype: str
    dimensions: tuple
    sums: str

    @property
    def equation(self) -> str:
        """The product as an einsum such as "ab,cb->ac": batch axes, then left's, then right's."""
        (contracted, others), (batch, batch_right) = self.dimensions
        left = string.ascii_lowercase[: len(self.left)]
        right = list(string.ascii_uppercase[: len(self.right)])
        for of_left, of_right in zip((*contracted, *batch), (*others, *batch_right), strict=True):
            right[of_right] = left[of_left]
        first = [left[axis] for axis in batch]
        rest = [c for c in left if c not in right]
        return f"{left},{''.join(right)}->{''.join([*first, *rest, *filter(str.isupper, right)])}"

    @property
    def flops(self) -> int:
        """Two per multiply-accumulate."""
        (_, contracted), (_, batch) = self.dimensions
        kept = [n for axis, n in enumerate(self.right) if axis not in (*contracted, *batch)]
        return 2 * math.prod(self.left) * math.prod(kept)

    @property
    def kind(self) -> str:
        """The use of such products; attention has one per image and head."""
        (contracted, others), (batch, _) = self.dimensions
        if batch:
            return ATTENTION
        return GRADIENTS if (*contracted, *others) == (0, 0) else MAPS


def products(jaxpr: core.Jaxpr) -> collections.Counter[Product]:
    """How often each product runs in a program; a `cond` counts its most expensive branch."""
    found: collections.Counter[Product] = collections.Counter()
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inner = inner_jaxprs(params)
        if name == "dot_general":
            found[_product(equation)] += 1
        elif name == "cond":
            found += products(max(inner, key=jaxpr_macs))
        else:
            for body in inner:
                for product, times in products(body).items():
                    found[product] += times * repetitions(name, params)
    return found


def _product(equation: core.JaxprEqn) -> Product:
    arrays: list[Any] = [variable.aval for variable in (*equation.invars, *equation.outvars)]
    left, right, out = arrays
    dimensions = equation.params["dimension_numbers"]
    return Product(left.shape, right.shape, str(left.dtype), dimensions, str(out.dtype))


class XLAProduct:
    """A product of two arrays of ones, computed by XLA outside any other program.

    Attributes:
      flops: FLOPs of the product.
    """

    def __init__(self, product: Product):
        self.flops = product.flops
        self._operands = [jnp.ones(shape, product.dtype) for shape in (product.left, product.right)]

        def multiply(left: jax.Array, right: jax.Array) -> jax.Array:
            sums: Any = product.sums
            return jax.lax.dot_general(left, right, product.dimensions, preferred_element_type=sums)

        self._multiply = jax.jit(multiply)

    def __call__(self) -> None:
        jax.block_until_ready(self._multiply(*self._operands))
