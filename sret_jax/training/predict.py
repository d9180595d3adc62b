"""Class probabilities of images, whatever their size and however they are given."""

import functools
import io
import os
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from sret_jax.data.images import BadImage, EvalTransform
from sret_jax.errors import UserError
from sret_jax.models.sret import SReT
from sret_jax.training.step import normalise

BATCH = 32

Picture = str | os.PathLike | bytes | Image.Image | np.ndarray


def predict(
    model: SReT,
    variables: dict[str, Any],
    images: Iterable[Picture],
    *,
    test_crop: float = 0.875,
) -> np.ndarray:
    """softmax(model(x)) of every image x, seen as in evaluation.

    Args:
      model: from `load` or `create_model`.
      variables: its weights, {"params", "batch_stats"}.
      images: paths, encoded bytes, PIL images, or uint8 RGB arrays (H, W, 3), of any sizes.
      test_crop: share of the shorter side that is seen, config.data.test_crop of a run.

    Returns:
      Probabilities (images, classes), float32.

    Raises:
      UserError: an image that cannot be read, or a test_crop out of range.
    """
    view = EvalTransform(model.image_size, test_crop)
    rows = [np.zeros((0, model.num_classes), np.float32)]
    for batch in _batches(_seen(images, view)):
        padding = [(0, BATCH - len(batch)), (0, 0), (0, 0), (0, 0)]
        whole = np.pad(batch, padding)  # one shape, compiled once
        rows.append(np.asarray(_probabilities(model, variables, whole))[: len(batch)])
    return np.concatenate(rows)


@functools.partial(jax.jit, static_argnums=0)
def _probabilities(model: SReT, variables: dict[str, Any], images: jax.Array) -> jax.Array:
    """(B, S, S, 3) uint8 -> (B, K)."""
    rngs = {"permutation": jax.random.key(0)}  # for permutation="random"
    logits: Any = model.apply(variables, normalise(images), train=False, rngs=rngs)
    return jax.nn.softmax(logits)


def _seen(images: Iterable[Picture], view: EvalTransform) -> Iterator[np.ndarray]:
    for number, image in enumerate(images):
        try:
            yield view(_encoded(image))
        except (BadImage, OSError, TypeError, ValueError) as e:
            name = image if isinstance(image, str | os.PathLike) else f"number {number}"
            raise UserError(
                f"image {name} cannot be read ({e}); give a path, bytes, a PIL image or a uint8 "
                "array (H, W, 3)"
            ) from e


def _encoded(image: Picture) -> bytes:
    """The bytes of an image file; what is in memory is written as PNG, which loses nothing."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, np.ndarray | jax.Array):
        if image.dtype != np.uint8:
            raise TypeError(f"its type is {image.dtype}")
        image = Image.fromarray(np.asarray(image))
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.convert("RGB").save(file, format="PNG")
        return file.getvalue()
    return epath.Path(image).read_bytes()


def _batches(images: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    batch = []
    for image in images:
        batch.append(image)
        if len(batch) == BATCH:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)
