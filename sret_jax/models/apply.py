"""Computes logits from images; no other file calls `model.apply`."""

from typing import Any

import jax
import jax.numpy as jnp

from sret_jax.models.halting import ExitRule, Signals
from sret_jax.models.model import Model
from sret_jax.models.read_out import mean_of_heads
from sret_jax.models.variables import Variables


def normalise(model: Model, images: jax.Array) -> jax.Array:
    """uint8 RGB -> (x / 255 - mean) / std with the model's statistics, float32.

    Shapes: (B, H, W, 3) -> (B, H, W, 3).
    """
    mean = jnp.asarray(model.mean).reshape(1, 1, 1, 3)
    std = jnp.asarray(model.std).reshape(1, 1, 1, 3)
    return (images.astype(jnp.float32) / 255 - mean) / std


def normalised_again(images: jax.Array, old: Model, new: Model) -> jax.Array:
    """Images that are normalised for the model `old`, normalised for `new` instead."""
    if (old.mean, old.std) == (new.mean, new.std):
        return images
    old_mean, old_std, mean, std = (
        jnp.asarray(x).reshape(1, 1, 1, 3) for x in (old.mean, old.std, new.mean, new.std)
    )
    return images * (old_std / std) + (old_mean - mean) / std


def evaluation_logits(model: Model, variables: Variables, images: jax.Array) -> jax.Array:
    """The logits in evaluation; nothing is random.

    Shapes: normalised images (B, S, S, 3) -> (B, classes).
    """
    rngs = {"permutation": jax.random.key(0)}  # for permutation="random"
    found: Any = model.apply(variables, images, train=False, rngs=rngs)
    return found


def exited_logits(
    model: Model, variables: Variables, images: jax.Array, rule: ExitRule
) -> tuple[jax.Array, jax.Array]:
    """The logits in evaluation of the exit that each image leaves at, and its number of loops.

    The last block is applied until all images of the batch have left.

    Shapes: normalised images (B, S, S, 3) -> (B, classes), (B,) int32.
    """
    rngs = {"permutation": jax.random.key(0)}
    found: Any = model.apply(variables, images, rule, rngs=rngs, method="exit_each")
    return found.logits, found.loops


def exit_signals(model: Model, variables: Variables, images: jax.Array) -> Signals:
    """What exit rules see in evaluation at every exit of the model.

    Shapes: normalised images (B, S, S, 3) -> (loops, B) each.
    """
    rngs = {"permutation": jax.random.key(0)}
    found: Any = model.apply(variables, images, rngs=rngs, method="exit_signals")
    return found


def application_outputs(
    model: Model, variables: Variables, images: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """The tokens after each application in evaluation, from first to last, and the logits.

    Shapes: normalised images (B, S, S, 3) -> per application (B, N, C), (B, classes).
    """
    rngs = {"permutation": jax.random.key(0)}
    of_blocks: Any = model.apply(
        variables, images, lambda _, x: x, rngs=rngs, method="observed"
    )  # (loops, B, N, C) per unique block
    states = [x for block in of_blocks for x in block]
    heads: Any = model.read_out().apply({"params": variables["params"]}, states[-1])
    return states, mean_of_heads(heads)


def training_logits(
    model: Model, variables: Variables, images: jax.Array, key: jax.Array, *, train: bool = True
) -> tuple[tuple[jax.Array, ...], Variables]:
    """The logits of each head in training; `key` draws drop paths and permutations.

    Args:
      model: from `create_model`.
      variables: the model's weights, and the collection "probes" if gradients are measured.
      images: normalised, (B, S, S, 3).
      key: random key of the batch.
      train: False: no drop path, fixed permutations, BatchNorm's running statistics.

    Returns:
      Per head its logits (B, classes); see `Model.head_logits`. And {"batch_stats": the updated
      statistics} if there is BatchNorm.
    """
    return _train("head_logits", model, variables, images, key, train)


def training_exits(
    model: Model, variables: Variables, images: jax.Array, key: jax.Array, *, train: bool = True
) -> tuple[tuple[jax.Array, ...], Variables]:
    """Like `training_logits`, but the logits of each head at every exit: (loops, B, classes)."""
    return _train("exit_logits", model, variables, images, key, train)


def _train(
    method: str, model: Model, variables: Variables, images: jax.Array, key: jax.Array, train: bool
) -> tuple[Any, Variables]:
    drop_path, permutation = jax.random.split(key)
    found, updates = model.apply(
        variables,
        images,
        train=train,
        rngs={"drop_path": drop_path, "permutation": permutation},
        mutable=["batch_stats"],
        method=method,
    )
    return found, dict(updates)
