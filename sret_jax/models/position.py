"""Changes the image size of a trained model by resizing what depends on it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sret_jax.models.checks import check
from sret_jax.models.model import Model

CUBIC = -0.75  # the a of torch and OpenCV; jax.image and Pillow take -0.5


def with_image_size(
    model: Model, variables: Mapping[str, Any], image_size: int, **sizes: Any
) -> tuple[Model, dict[str, Any]]:
    """Changes a trained model's image size, without training.

    Args:
      model: the trained model.
      variables: {"params": ..., "batch_stats": ...} of that model.
      image_size: side of the new model's images in pixels.
      **sizes: other settings in `Model.resizable`.

    Returns:
      (model, variables) for the new size. Only arrays that depend on it differ, such as positions.

    Raises:
      ValueError: the model cannot have that size, or its arrays cannot be resized.
    """
    new = model.clone(image_size=image_size, **sizes)
    check(new)
    return new, {**variables, "params": new.resized(variables["params"], model)}


def resize_position(position: jax.Array, side: int) -> jax.Array:
    """Resizes a position array bicubically, as fine-tuning at another resolution does (DeiT).

    The result equals torch's F.interpolate(mode="bicubic", align_corners=False): no antialiasing,
    and the border is repeated.

    Shapes: (1, H, W, C) -> (1, side, side, C).
    """
    _, height, width, _ = position.shape
    if (height, width) == (side, side):
        return position
    rows, columns = (jnp.asarray(_cubic_weights(n, side)) for n in (height, width))
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, position, precision=exact)


def _cubic_weights(old: int, new: int) -> np.ndarray:
    """The matrix W of y = W x, y_i = sum_j k(s_i - j) x_j at s_i = (i + 1/2) old / new - 1/2.

    k is Keys' kernel ("Cubic convolution interpolation for digital image processing", 1981,
    equation 4) with a = CUBIC. Where j is outside the array, x_j is the nearest border element.

    Shapes: (new, old), float32.
    """
    source = (np.arange(new) + 0.5) * (old / new) - 0.5
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        j = np.floor(source) + tap
        x, a = np.abs(source - j), CUBIC
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        kernel = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
        columns = np.clip(j, 0, old - 1).astype(int)
        np.add.at(weights, (np.arange(new), columns), kernel)
    return weights.astype(np.float32)
