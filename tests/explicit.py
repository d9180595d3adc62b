"""Recursions compared with explicit applications of the same block, for any family."""

import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sret_jax.models.adapters import Adapter
from sret_jax.models.layers.attention import Slices, fixed_permutation
from sret_jax.models.model import Model
from sret_jax.models.per_loop import NonLinearLayers
from sret_jax.models.recursion import Recursion
from sret_jax.models.variables import abstract_variables
from tests.timm_models import images


def one_by_one(next_method: Callable, args: Any, kwargs: Any, context: Any) -> Any:
    """Applies blocks, NLLs and adapters one by one in place of `Recursion`.

    It is for `nn.intercept_methods`. Tokens are permuted as in evaluation.
    """
    recursion = context.module
    of_recursion = isinstance(recursion, Recursion) and context.method_name == "observed"
    if not of_recursion or recursion.is_initializing():
        return next_method(*args, **kwargs)
    (x,), params, seen = args, recursion.variables["params"], []
    first, adapters = x, [own for own in recursion.per_loop if isinstance(own, Adapter)]
    nlls = [own for own in recursion.per_loop if isinstance(own, NonLinearLayers)]
    block: Any = recursion.block.clone(parent=None, name=None)
    for loop in range(recursion.loops):
        turn: Any = recursion.turns[loop % len(recursion.turns)]
        given = {} if turn is None else {"turn": turn}
        if isinstance(turn, Slices) and turn.permuted:
            given["permutation"] = fixed_permutation(None, x.shape[1] - block.prefix)
        before = x
        shared = flatten_dict(params["block"], sep="/")
        for own in adapters:
            adapted = flatten_dict(params[own.name], sep="/")
            row = {path: leaf[loop // own.share] for path, leaf in adapted.items()}
            shared, x = apply_adapter(own.name, row, shared, x, first)
        x = block.apply({"params": unflatten_dict(shared, sep="/")}, x, **given)
        for own in nlls:
            row, left = divmod(loop + 1, own.every)
            if not left:
                nll = jax.tree.map(lambda leaf, row=row: leaf[row - 1], params["nll"])
                x = own.layer.apply({"params": nll}, x, jnp.ones(len(x)))
        if observe := kwargs.get("observe"):
            seen.append(observe(before, x))
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen) if seen else None


def apply_adapter(
    name: str, row: dict[str, Any], shared: dict[str, Any], x: Any, first: Any
) -> tuple[dict[str, Any], Any]:
    """The block's parameters and input as an application with this row of an adapter sees them."""
    if name == "lora":
        maps = {path.removesuffix("/up/kernel") for path in row if path.endswith("/up/kernel")}
        added = {f"{m}/kernel": row[f"{m}/down/kernel"] @ row[f"{m}/up/kernel"] for m in maps}
        return shared | {path: shared[path] + new for path, new in added.items()}, x
    if name in ("norms", "biases"):
        return shared | {path: shared[path] + new for path, new in row.items()}, x
    if name == "embedding":
        return shared, x + row["bias"].reshape(1, 1, -1)
    if "gain" in row:
        return shared, x + row["gain"].reshape(1, 1, -1) * first
    return shared, x + jnp.einsum("bnc,cd->bnd", first, row["kernel"])


def distinct_weights(model: Model) -> Any:
    """Variables that all differ: scales and coefficients near 1, the others near 0."""

    def draw(path: Any, leaf: Any) -> np.ndarray:
        near = 1 if path[-1].key in ("scale", "skip", "branch") else 0
        name = zlib.crc32("/".join(part.key for part in path).encode())
        return near + 0.3 * np.random.default_rng([0, name]).standard_normal(leaf.shape)

    return jax.tree_util.tree_map_with_path(draw, abstract_variables(model))


def check_recursion(model: Model) -> None:
    """Asserts that the model's recursions are explicit applications, in values and gradients.

    The values are the logits at every exit, of which the last are the model's.

    Args:
      model: a model without BatchNorm, in float64.
    """
    params, x = distinct_weights(model)["params"], images(model.image_size)

    def loss(params: Any) -> tuple[jax.Array, Any]:
        exits: Any = model.apply({"params": params}, x, method="exit_logits")
        weights = jnp.arange(1, model.loops + 1)[:, None, None]  # (loops, 1, 1)
        total = sum((weights * logits**2).sum() * (i + 1) for i, logits in enumerate(exits))
        return total, exits

    def explicit(params: Any) -> tuple[jax.Array, Any]:
        with nn.intercept_methods(one_by_one):
            return loss(params)

    both = jax.jit(lambda p: [jax.value_and_grad(f, has_aux=True)(p) for f in (loss, explicit)])
    found, expected = both(params)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1]))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == np.float64
        assert np.any(b), "a parameter has no gradient"
        scale = max(float(jnp.abs(b).max()), 1e-3 * largest)  # some gradients are 0, but rounded
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * scale)
    heads: Any = model.apply({"params": params}, x, method="head_logits")
    for logits, exits in zip(heads, found[0][1], strict=True):
        assert len({float(jnp.abs(at_exit).max()) for at_exit in exits}) == model.loops
        np.testing.assert_allclose(logits, exits[-1], rtol=0, atol=1e-10 * jnp.abs(logits).max())
