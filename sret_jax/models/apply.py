"""The call of a model: from stored images to logits."""

from typing import Any

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
