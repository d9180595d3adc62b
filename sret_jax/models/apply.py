"""Computes logits from images; no other file calls `model.apply`."""

from typing import Any

import jax
import jax.numpy as jnp

from sret_jax.models.model import Model
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
    old_mean, old_std, mean, std = (jnp.asarray(x) for x in (old.mean, old.std, new.mean, new.std))
    return images * (old_std / std) + (old_mean - mean) / std


def evaluation_logits(model: Model, variables: Variables, images: jax.Array) -> jax.Array:
    """The logits in evaluation; nothing is random.

    Shapes: normalised images (B, S, S, 3) -> (B, classes).
    """
    rngs = {"permutation": jax.random.key(0)}  # for permutation="random"
    found: Any = model.apply(variables, images, train=False, rngs=rngs)
    return found


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
    drop_path, permutation = jax.random.split(key)
    found, updates = model.apply(
        variables,
        images,
        train=train,
        rngs={"drop_path": drop_path, "permutation": permutation},
        mutable=["batch_stats"],
        method="head_logits",
    )
    return found, dict(updates)


def mean_of_heads(logits: tuple[jax.Array, ...]) -> jax.Array:
    """The logits of a model with these logits of each head: (B, K) each -> (B, K)."""
    total = logits[0]
    for of_head in logits[1:]:
        total += of_head
    return total / len(logits) if len(logits) > 1 else total
