"""Host-side image work: decoding, the training crop, the evaluation crop. No JAX here."""

import dataclasses
import io
import math

import numpy as np
from PIL import Image

from sret_jax.errors import UserError

CROP_ATTEMPTS = 10


class BadImage(ValueError):
    """Bytes that are no readable image."""


def decode(data: bytes) -> Image.Image:
    """Decodes an image to RGB by what its bytes are, whatever its file was called.

    JPEG or PNG, greyscale, CMYK, palette or RGB.

    Raises:
      BadImage: unreadable or truncated bytes.
    """
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise BadImage(str(e)) from e


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Random-resized crop and horizontal flip, as torchvision samples them.

    A box whose area is uniform in `scale` (share of the image) and whose aspect ratio w/h is
    log-uniform in `ratio`, resized bicubically to size x size; then a flip with probability
    `flip`. After ten boxes that do not fit: the largest central box within `ratio`.

    Shapes: an RGB image of any size -> (size, size, 3) uint8.
    """

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float

    def __post_init__(self):
        _check_range("crop_scale", self.scale, above=0, most=1)
        _check_range("crop_ratio", self.ratio, above=0, most=math.inf)
        if not 0 <= self.flip <= 1:
            raise UserError(f"data.flip={self.flip} is no probability; use a number in [0, 1]")

    def __call__(self, data: bytes, rng: np.random.Generator) -> np.ndarray:
        image = decode(data)
        box = self._sample_box(image.width, image.height, rng)
        image = image.crop(box).resize((self.size, self.size), Image.Resampling.BICUBIC)
        pixels = np.asarray(image)
        return pixels[:, ::-1] if rng.random() < self.flip else pixels

    def _sample_box(
        self, width: int, height: int, rng: np.random.Generator
    ) -> tuple[int, int, int, int]:
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(CROP_ATTEMPTS):
            area = width * height * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(low, high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left = int(rng.integers(0, width - w + 1))
                top = int(rng.integers(0, height - h + 1))
                return left, top, left + w, top + h
        return self._central_box(width, height)

    def _central_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w = min(width, max(1, round(height * ratio)))
        h = min(height, max(1, round(width / ratio)))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """The evaluation view: shorter side to round(size / crop), bicubic, then the central square.

    Shapes: an RGB image of any size -> (size, size, 3) uint8.
    """

    size: int
    crop: float

    def __post_init__(self):
        if not 0 < self.crop <= 1:
            raise UserError(f"data.test_crop={self.crop} is no share; use a number in (0, 1]")

    def __call__(self, data: bytes, rng: np.random.Generator | None = None) -> np.ndarray:
        del rng
        image = decode(data)
        short = round(self.size / self.crop)
        if image.width <= image.height:
            target = (short, max(short, short * image.height // image.width))
        else:
            target = (max(short, short * image.width // image.height), short)
        image = image.resize(target, Image.Resampling.BICUBIC)
        left = round((image.width - self.size) / 2)
        top = round((image.height - self.size) / 2)
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))


def _check_range(name: str, values: tuple[float, float], *, above: float, most: float) -> None:
    if len(values) != 2 or not above < values[0] <= values[1] <= most:
        raise UserError(
            f"data.{name}={values} is no range; use two ascending numbers in ({above}, {most}]"
        )
