"""Crops that are drawn once, stored, and later reproduced exactly, to the last bit. No JAX here."""

from collections.abc import Iterable

import cv2
import numpy as np

from sret_jax.data.views.images import decode_crops
from sret_jax.data.views.jpeg import Box
from sret_jax.data.views.training_view import TrainTransform, resize

CROP_STREAM = 2  # order.SHUFFLE_STREAM and AUGMENT_STREAM are the others
UNIT = 2**16 - 1  # coordinates are stored in UNITths of the sides; exact below 65,535 pixels
CROP = np.dtype([("box", "<u2", 4), ("flip", "?")])  # left, top, right, bottom


def draw_views(
    data: bytes, transform: TrainTransform, count: int, *, seed: int, record: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws crops and flips from the distribution of `transform`, without policy and colour jitter.

    The n-th crop depends on (seed, record, n) and the size of the image alone.

    Args:
      data: the bytes of the image.
      transform: gives the size, the crop ranges and the probability of a flip.
      count: number of crops.
      seed: seed of the crops.
      record: number of the image in its data set.

    Returns:
      The crops, (count,) CROP, and their pixels, (count, S, S, 3) uint8.

    Raises:
      BadImage: unreadable or truncated bytes.
    """
    crops = np.zeros(count, CROP)

    def draw(width: int, height: int) -> list[Box]:
        for number in range(count):
            rng = np.random.default_rng([seed, CROP_STREAM, record, number])
            box = transform.sample_box(width, height, rng)
            crops[number] = to_stored(box, width, height), rng.random() < transform.flip
        return [to_pixels(box, width, height) for box in crops["box"]]

    parts = decode_crops(data, draw, transform.size)
    return crops, _views(parts, crops, transform.size)


def replay_views(data: bytes, crops: np.ndarray, size: int) -> np.ndarray:
    """The pixels of stored crops, as `draw_views` returned them. The image is decoded once.

    Shapes: (m,) with the fields of CROP -> (m, size, size, 3) uint8.

    Raises:
      BadImage: unreadable or truncated bytes.
    """
    parts = decode_crops(
        data, lambda width, height: [to_pixels(box, width, height) for box in crops["box"]], size
    )
    return _views(parts, crops, size)


def to_stored(box: Box, width: int, height: int) -> tuple[int, ...]:
    """Converts a box from pixels to fractions of the image's sides, in UNITths."""
    sides = (width, height, width, height)
    return tuple((x * UNIT + side // 2) // side for x, side in zip(box, sides, strict=True))


def to_pixels(box: Iterable[int], width: int, height: int) -> Box:
    """Converts a stored box to pixels; each side has at least one."""
    left, top, right, bottom = (
        (int(x) * side + UNIT // 2) // UNIT
        for x, side in zip(box, (width, height, width, height), strict=True)
    )
    left, top = min(left, width - 1), min(top, height - 1)
    return left, top, max(right, left + 1), max(bottom, top + 1)


def _views(parts: list[np.ndarray], crops: np.ndarray, size: int) -> np.ndarray:
    views = [resize(part, size) for part in parts]
    flips = crops["flip"]
    return np.stack([cv2.flip(v, 1) if f else v for v, f in zip(views, flips, strict=True)])
