"""The training view of an image: random crop, flip, RandAugment or Three-Augment, colour jitter."""

import dataclasses
import functools
import math
from collections.abc import Callable

import cv2
import numpy as np

from sret_jax.data.views import pixels as ops
from sret_jax.data.views.images import decode_crop
from sret_jax.data.views.jpeg import Box
from sret_jax.data.views.randaugment import RandAugment
from sret_jax.errors import UserError, did_you_mean

CROP_ATTEMPTS = 10
WIDEST = 100  # largest width / height
BLUR_RADIUS = (0.1, 2.0)
SOLARIZE_THRESHOLD = 128

Policy = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """A random-resized crop and flip, sampled as in torchvision, then a policy and colour jitter.

    The crop is a box whose area is uniform in `crop_scale` (fraction of the image) and whose aspect
    ratio w/h is log-uniform in `crop_ratio`. If ten such boxes do not fit, it is the largest
    central box within `crop_ratio`. The crop is resized bicubically to size x size.

    Shapes: an image of any size -> (size, size, 3) uint8.

    Attributes:
      size: side of the view in pixels.
      crop_scale, crop_ratio: ranges of the crop's area and aspect ratio.
      flip: probability of a horizontal flip.
      policy: "rand-..." in timm's notation, "three" (Three-Augment), or "" for none.
      color_jitter: brightness, contrast and saturation factors are uniform in 1 +- this; 0: none.
    """

    size: int
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: float = 0.0
    policy: str = ""
    color_jitter: float = 0.0

    def __post_init__(self):
        _check_range("crop_scale", self.crop_scale, above=0, most=1)
        _check_range("crop_ratio", self.crop_ratio, above=0, most=WIDEST)
        _check_share("flip", self.flip)
        _check_share("color_jitter", self.color_jitter)
        parse_policy(self.policy)

    @functools.cached_property
    def _policy(self) -> Policy | None:
        return parse_policy(self.policy)

    def __call__(self, data: bytes, rng: np.random.Generator) -> np.ndarray:
        return self.augment(self.view(data, rng), rng)

    def view(self, data: bytes, rng: np.random.Generator) -> np.ndarray:
        """Decodes, crops, resizes and flips."""
        part = decode_crop(data, lambda w, h: self.sample_box(w, h, rng), self.size)
        pixels = resize(part, self.size)
        return cv2.flip(pixels, 1) if rng.random() < self.flip else pixels

    def augment(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Changes colours and geometry: applies the policy, then the colour jitter."""
        if self._policy:
            pixels = self._policy(pixels, rng)
        return jitter_colors(pixels, self.color_jitter, rng) if self.color_jitter else pixels

    def sample_box(self, width: int, height: int, rng: np.random.Generator) -> Box:
        """Draws the crop of an image of that size."""
        low, high = math.log(self.crop_ratio[0]), math.log(self.crop_ratio[1])
        for _ in range(CROP_ATTEMPTS):
            area = width * height * rng.uniform(*self.crop_scale)
            ratio = math.exp(rng.uniform(low, high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left = int(rng.integers(0, width - w + 1))
                top = int(rng.integers(0, height - h + 1))
                return left, top, left + w, top + h
        return self._central_box(width, height)

    def _central_box(self, width: int, height: int) -> Box:
        ratio = min(max(width / height, self.crop_ratio[0]), self.crop_ratio[1])
        w = min(width, max(1, round(height * ratio)))
        h = min(height, max(1, round(width / ratio)))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """Bicubic resize with antialiasing, close to Pillow's (PSNR 46 dB on the median crop).

    A side that shrinks is interpolated to twice `size`, then halved by averaging. If a side shrinks
    to less than half, both sides are averaged over areas.

    Shapes: (H, W, 3) uint8 -> (size, size, 3).
    """
    height, width, _ = pixels.shape
    if max(height, width) > 2 * size:
        return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)
    fine = (size * (1 + (width > size)), size * (1 + (height > size)))
    pixels = cv2.resize(pixels, fine, interpolation=cv2.INTER_CUBIC)
    return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)


def parse_policy(name: str) -> Policy | None:
    """Returns the policy with that name.

    Raises:
      UserError: the name is unknown, or a setting of RandAugment is invalid.
    """
    if not name:
        return None
    if name == "three":
        return three_augment
    if name.split("-")[0] == "rand":
        return RandAugment.parse(name)
    known = ("rand-m9-mstd0.5-inc1", "three")
    raise UserError(f"config.augment.policy: {did_you_mean('policy', name, known)}")


def three_augment(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Applies one of greyscale, solarization and Gaussian blur (Touvron et al., ECCV 2022)."""
    choice = rng.integers(3)
    if choice == 0:
        return ops.to_grey(pixels)
    if choice == 1:
        return ops.solarize(pixels, SOLARIZE_THRESHOLD)
    return cv2.GaussianBlur(pixels, (0, 0), rng.uniform(*BLUR_RADIUS))


def jitter_colors(pixels: np.ndarray, spread: float, rng: np.random.Generator) -> np.ndarray:
    """Changes brightness, contrast, saturation in random order; factors uniform in 1 +- spread."""
    changes = (ops.brightness, ops.contrast, ops.color)
    for i in rng.permutation(len(changes)):
        pixels = changes[i](pixels, rng.uniform(1 - spread, 1 + spread))
    return pixels


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"config.augment.{name}={value} must be a number in [0, 1]")


def _check_range(name: str, values: tuple[float, float], *, above: float, most: float) -> None:
    numbers = [value for value in values if isinstance(value, int | float)]
    if len(values) != 2 or numbers != list(values) or not above < values[0] <= values[1] <= most:
        raise UserError(
            f"config.augment.{name}={values} must be two ascending numbers in ({above}, {most}]"
        )
