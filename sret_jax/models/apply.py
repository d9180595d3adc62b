"""Computes logits from images; no other file calls `model.apply`."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Variables = dict[str, Any]

# Mean and standard deviation of ImageNet's pixels (red, green, blue) in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(images: jax.Array) -> jax.Array:
    """uint8 RGB -> (x / 255 - mean) / std with the ImageNet statistics, float32.

    Shapes: (B, H, W, 3) -> (B, H, W, 3).
    """
    mean = jnp.asarray(IMAGENET_MEAN).reshape(1, 1, 1, 3)
    std = jnp.asarray(IMAGENET_STD).reshape(1, 1, 1, 3)
    return (images.astype(jnp.float32) / 255 - mean) / std


def evaluation_logits(model: nn.Module, variables: Variables, images: jax.Array) -> jax.Array:
    """The logits in evaluation; nothing is random.

    Shapes: normalised images (B, S, S, 3) -> (B, classes).
    """
    rngs = {"permutation": jax.random.key(0)}  # for permutation="random"
    found: Any = model.apply(variables, images, train=False, rngs=rngs)
    return found


def training_logits(
    model: nn.Module, variables: Variables, images: jax.Array, key: jax.Array, *, train: bool = True
) -> tuple[jax.Array, Any]:
    """The logits in training; `key` draws drop paths and permutations.

    Args:
      model: from `create_model`.
      variables: the model's weights, and the collection "probes" if gradients are measured.
      images: normalised, (B, S, S, 3).
      key: random key of the batch.
      train: False: no drop path, fixed permutations, BatchNorm's running statistics.

    Returns:
      The logits (B, classes) and the updated BatchNorm statistics.
    """
    drop_path, permutation = jax.random.split(key)
    found, updates = model.apply(
        variables,
        images,
        train=train,
        rngs={"drop_path": drop_path, "permutation": permutation},
        mutable=["batch_stats"],
    )
    return found, updates["batch_stats"]
