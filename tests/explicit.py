"""Recursions as explicit applications of the same block, for any family."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sret_jax.models.layers.attention import Slices, fixed_permutation
from sret_jax.models.per_loop import NonLinearLayers
from sret_jax.models.recursion import Recursion


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


def explicit_logits(model: nn.Module, params: Any, images: jax.Array) -> jax.Array:
    """The logits in evaluation, where each application of a block stands by itself."""
    with nn.intercept_methods(one_by_one):
        logits: Any = model.apply({"params": params}, images)
    return logits
