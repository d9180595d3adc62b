"""Recursions compared with explicit applications of the same block, for any family."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sret_jax.models.layers.attention import Slices, fixed_permutation
from sret_jax.models.model import Model
from sret_jax.models.per_loop import NonLinearLayers
from sret_jax.models.recursion import Recursion
from sret_jax.models.variables import abstract_variables
from tests.timm_models import images


def one_by_one(next_method: Callable, args: Any, kwargs: Any, context: Any) -> Any:
    """Applies blocks and NLLs one by one in place of `Recursion`, for `nn.intercept_methods`.

    Tokens are permuted as in evaluation.
    """
    recursion = context.module
    if not isinstance(recursion, Recursion) or recursion.is_initializing():
        return next_method(*args, **kwargs)
    (x,), params = args, recursion.variables["params"]
    nlls = [own for own in recursion.per_loop if isinstance(own, NonLinearLayers)]
    block: Any = recursion.block.clone(parent=None, name=None)
    for loop in range(recursion.loops):
        turn: Any = recursion.turns[loop % len(recursion.turns)]
        given = {} if turn is None else {"turn": turn}
        if isinstance(turn, Slices) and turn.permuted:
            given["permutation"] = fixed_permutation(None, x.shape[1] - block.prefix)
        x = block.apply({"params": params["block"]}, x, **given)
        for own in nlls:
            row, left = divmod(loop + 1, own.every)
            if not left:
                nll = jax.tree.map(lambda leaf, row=row: leaf[row - 1], params["nll"])
                x = own.layer.apply({"params": nll}, x, jnp.ones(len(x)))
    return x


def distinct_weights(model: Model) -> Any:
    """Variables that all differ: scales and coefficients near 1, the others near 0."""

    def draw(path: Any, leaf: Any) -> np.ndarray:
        near = 1 if path[-1].key in ("scale", "skip", "branch") else 0
        return near + 0.3 * np.random.default_rng([0, leaf.size]).standard_normal(leaf.shape)

    return jax.tree_util.tree_map_with_path(draw, abstract_variables(model))


def check_recursion(model: Model) -> None:
    """Asserts that the model's recursions are explicit applications, in values and gradients.

    Args:
      model: a model without BatchNorm, in float64.
    """
    params, x = distinct_weights(model)["params"], images(model.image_size)

    def loss(params: Any) -> jax.Array:
        heads: Any = model.apply({"params": params}, x, method="head_logits")
        return sum((logits**2).sum() * (i + 1) for i, logits in enumerate(heads))

    def explicit(params: Any) -> jax.Array:
        with nn.intercept_methods(one_by_one):
            return loss(params)

    both = jax.jit(lambda p: [jax.value_and_grad(f)(p) for f in (loss, explicit)])
    found, expected = both(params)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1]))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == np.float64
        scale = max(float(jnp.abs(b).max()), 1e-3 * largest)  # some gradients are 0, but rounded
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * scale)
