"""Multiply-accumulates counted from the program itself, loop bodies times their length."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.extend import core

from sret_jax.models.sret import SReT, abstract_variables


def count_macs(fn: Callable, *args: Any) -> int:
    """Multiply-accumulates of the matrix products and convolutions in one call of `fn`.

    Unlike XLA's cost analysis it counts a scan's body as often as it runs. Of the branches of a
    `cond` the dearest counts.

    Args:
      fn: a traceable function.
      *args: arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: a `while` loop, whose trip count the program does not tell.
    """
    return _jaxpr_macs(jax.make_jaxpr(fn)(*args).jaxpr)


def model_macs(model: SReT) -> int:
    """Multiply-accumulates of one image's forward pass, Q K^T and A V included."""
    image = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), "float32")
    rngs = {"permutation": jax.random.key(0)}  # for permutation="random"
    return count_macs(partial(model.apply, rngs=rngs), abstract_variables(model), image)


def _jaxpr_macs(jaxpr: core.Jaxpr) -> int:
    return sum(_equation_macs(equation) for equation in jaxpr.eqns)


def _equation_macs(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = _shape(equation.invars[0])
        depth = math.prod(left[axis] for axis in contracted)
        return math.prod(_shape(equation.outvars[0])) * depth
    if name == "conv_general_dilated":
        kernel = _shape(equation.invars[1])
        per_output = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
        return math.prod(_shape(equation.outvars[0])) * per_output
    if name == "while":
        raise ValueError("a while loop's trip count is unknown; use scan to count its MACs")
    inner = [_jaxpr_macs(jaxpr) for jaxpr in _inner_jaxprs(params)]
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _inner_jaxprs(params: dict[str, Any]) -> list[core.Jaxpr]:
    leaves = jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr)
    return [
        leaf.jaxpr if isinstance(leaf, core.ClosedJaxpr) else leaf
        for leaf in leaves
        if _is_jaxpr(leaf)
    ]


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, core.Jaxpr | core.ClosedJaxpr)
