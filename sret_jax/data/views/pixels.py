"""Image operations that reproduce Pillow's results to within one level, most of them exactly.

They compute on (H, W, 3) uint8 arrays with look-up tables and OpenCV. Only rotation calls Pillow
itself: OpenCV has no such interpolation kernel, and NumPy would be no faster.
"""

import functools
import math

import cv2
import numpy as np
from PIL import Image

Pixels = np.ndarray

FILL = (124, 116, 104)  # ImageNet's mean
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
TRUNCATE = -0.4999  # makes OpenCV's rounding truncate, as Pillow does; whole numbers do not change
LEVELS = np.arange(256)

cv2.setNumThreads(0)  # the loader's threads or workers already fill the cores


def autocontrast(pixels: Pixels) -> Pixels:
    """Stretches each channel: v -> 255 (v - low) / (high - low)."""
    return _look_up(pixels, *map(_stretched, _histograms(pixels)))


def equalize(pixels: Pixels) -> Pixels:
    """Flattens each channel's histogram."""
    return _look_up(pixels, *map(_flattened, _histograms(pixels)))


def invert(pixels: Pixels) -> Pixels:
    """V -> 255 - v."""
    return 255 - pixels


def rotate(pixels: Pixels, degrees: float) -> Pixels:
    """Rotates counter-clockwise around the centre, bicubic, into the same frame."""
    turned = Image.fromarray(pixels).rotate(degrees, Image.Resampling.BICUBIC, fillcolor=FILL)
    return np.asarray(turned)


def posterize(pixels: Pixels, bits: float) -> Pixels:
    """Keeps the highest `bits` bits of each value; with none the picture is black."""
    return pixels & np.uint8(256 - 2 ** (8 - int(bits)))


def solarize(pixels: Pixels, threshold: float) -> Pixels:
    """V -> 255 - v where v >= threshold."""
    return _look_up(pixels, np.where(threshold > LEVELS, LEVELS, 255 - LEVELS))


def solarize_add(pixels: Pixels, add: float) -> Pixels:
    """V -> min(255, v + add) where v < 128."""
    return _look_up(pixels, np.where(LEVELS < 128, np.minimum(LEVELS + int(add), 255), LEVELS))


def color(pixels: Pixels, factor: float) -> Pixels:
    """Grey + factor (v - grey), where grey is the luma of the pixel."""
    return _blend(to_grey(pixels), pixels, factor)


def contrast(pixels: Pixels, factor: float) -> Pixels:
    """Mean + factor (v - mean), where mean is the rounded mean luma of the picture."""
    mean = int(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).mean() + 0.5)
    return _look_up(pixels, _blended_levels(mean, factor))


def brightness(pixels: Pixels, factor: float) -> Pixels:
    """V -> factor v."""
    return _look_up(pixels, _blended_levels(0, factor))


def sharpness(pixels: Pixels, factor: float) -> Pixels:
    """Smooth + factor (v - smooth), where smooth is a 3x3 mean with fivefold centre weight."""
    smooth = pixels.copy()
    smooth[1:-1, 1:-1] = cv2.filter2D(pixels, -1, SMOOTH)[1:-1, 1:-1]
    return _blend(smooth, pixels, factor)


def shear_x(pixels: Pixels, slope: float) -> Pixels:
    """out(x, y) = in(x + slope y, y), bicubic."""
    return _shift_rows(pixels, slope * (np.arange(len(pixels)) + 0.5))


def shear_y(pixels: Pixels, slope: float) -> Pixels:
    """out(x, y) = in(x, y + slope x), bicubic."""
    return cv2.transpose(shear_x(cv2.transpose(pixels), slope))


def translate_x(pixels: Pixels, share: float) -> Pixels:
    """out(x, y) = in(x + share W, y), bicubic."""
    width = pixels.shape[1]
    shift = share * width
    whole = math.floor(shift)
    columns = np.clip(np.arange(-1, width + 2) + whole, 0, width - 1)
    taps = np.take(pixels, columns, axis=1)  # (H, W + 3, 3)
    weights = _cubic_weights(np.array([shift - whole]))  # (1, 4)
    shifted = cv2.filter2D(taps, -1, weights, anchor=(0, 0), delta=TRUNCATE)[:, :width]
    shifted[:, : max(0, math.ceil(-0.5 - shift))] = FILL
    shifted[:, max(0, math.ceil(width - 0.5 - shift)) :] = FILL
    return np.ascontiguousarray(shifted)


def translate_y(pixels: Pixels, share: float) -> Pixels:
    """out(x, y) = in(x, y + share H), bicubic."""
    return cv2.transpose(translate_x(cv2.transpose(pixels), share))


def to_grey(pixels: Pixels) -> Pixels:
    """The luma 0.299 R + 0.587 G + 0.114 B in all three channels."""
    return cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def _look_up(pixels: Pixels, *tables: np.ndarray) -> Pixels:
    """Replaces each value by its entry in the table; there is one table, or one per channel."""
    stacked = np.stack(tables, -1).astype(np.uint8)  # (256, 1 or 3)
    return cv2.LUT(pixels, stacked.reshape(1, 256, -1))


def _histograms(pixels: Pixels) -> list[np.ndarray]:
    return [
        cv2.calcHist([channel], [0], None, [256], [0, 256]).ravel().astype(int)
        for channel in cv2.split(pixels)
    ]


def _stretched(histogram: np.ndarray) -> np.ndarray:
    low, *_, high = np.flatnonzero(histogram)[[0, -1]]
    if high <= low:
        return LEVELS
    scale = 255 / (high - low)
    return np.clip((LEVELS * scale - low * scale).astype(int), 0, 255)


def _flattened(histogram: np.ndarray) -> np.ndarray:
    step = (histogram.sum() - histogram[np.flatnonzero(histogram)[-1]]) // 255
    if not step:
        return LEVELS
    below = np.cumsum(histogram) - histogram
    return np.minimum((step // 2 + below) // step, 255)


def _blended_levels(degenerate: int, factor: float) -> np.ndarray:
    """Degenerate + factor (v - degenerate) for every level v, in Pillow's single precision."""
    levels = LEVELS.astype(np.float32)
    blended = np.float32(degenerate) + np.float32(factor) * (levels - np.float32(degenerate))
    return np.clip(blended, 0, 255).astype(int)


def _blend(degenerate: Pixels, pixels: Pixels, factor: float) -> Pixels:
    return cv2.addWeighted(pixels, factor, degenerate, 1 - factor, TRUNCATE)


def _cubic_weights(t: np.ndarray) -> np.ndarray:
    """Weights of the pixels at -1, 0, 1, 2 for a point at t in [0, 1): (N,) -> (N, 4).

    This is the cubic convolution of R. Keys (1981) with a = -1, which Pillow's transforms use.
    """
    far = t * (1 - t)
    return np.stack([-(1 - t) * far, (1 - t) * (1 + far), t * (1 + far), -t * far], -1)


def _shift_rows(pixels: Pixels, shift: np.ndarray) -> Pixels:
    """out(x, y) = in(x + shift[y], y), bicubic; FILL where that is outside the picture.

    Shapes: (H, W, 3), (H,) -> (H, W, 3).
    """
    height, width, _ = pixels.shape
    whole = np.floor(shift)
    weights = _cubic_weights(shift - whole).astype(np.float32)  # (H, 4)
    x = np.arange(-1, width + 2, dtype=np.float32) + whole.astype(np.float32)[:, None]
    y = np.zeros_like(x) + np.arange(height, dtype=np.float32)[:, None]
    taps = cv2.remap(pixels, x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
    taps = taps.astype(np.float32).reshape(height, -1)  # (H, 3 (W + 3))
    shifted = taps[:, : 3 * width] * weights[:, :1]
    product = np.empty_like(shifted)
    for i in (1, 2, 3):
        shifted += np.multiply(taps[:, 3 * i : 3 * (i + width)], weights[:, i : i + 1], out=product)
    moved = np.clip(shifted, 0, 255, out=product).astype(np.uint8).reshape(pixels.shape)
    centres = np.arange(width, dtype=np.float32) + (0.5 + shift).astype(np.float32)[:, None]
    outside = ((centres < 0) | (centres >= width)).astype(np.uint8)
    return cv2.copyTo(_filled(height, width), outside, moved)


@functools.lru_cache(maxsize=1)
def _filled(height: int, width: int) -> Pixels:
    return np.full((height, width, 3), FILL, np.uint8)
