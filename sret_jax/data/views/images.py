"""Decodes stored images, and makes the evaluation view. No JAX here."""

import dataclasses
import io
import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

from sret_jax.data.views import jpeg
from sret_jax.data.views.jpeg import Box
from sret_jax.errors import UserError

UPRIGHT = {  # EXIF orientation: the transposition that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The formats of data sets, whatever the files are called (JPEG covers MPO, which has several
# pictures). Pillow's other parsers, one of which starts Ghostscript, never see untrusted bytes.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")
LONGEST = 16  # largest ratio of the sides; only a part of a longer image is resized

# Pillow warns about large images that it decodes nevertheless.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module="PIL.TiffImagePlugin")  # and about damaged EXIF


class BadImage(ValueError):
    """The bytes are not a readable image."""


def decode(data: bytes) -> Image.Image:
    """Decodes an image to upright RGB. The format is recognised by the bytes, not the file name.

    Formats are JPEG, PNG, GIF, WebP and BMP; greyscale, CMYK, palette or RGB. 16-bit values keep
    their upper 8 bits, transparency is dropped, the first of several pictures is taken, and the
    EXIF orientation is applied.

    Raises:
      BadImage: the bytes are unreadable, truncated or of another format, or the image has more
        than 179 million pixels; such an image is not decoded.
    """
    try:
        return upright_rgb(Image.open(io.BytesIO(data), formats=FORMATS))
    except UnidentifiedImageError as e:
        raise BadImage(f"no readable {', '.join(FORMATS)}") from e
    except Exception as e:  # Pillow raises almost anything on damaged bytes
        raise BadImage(str(e)) from e


def upright_rgb(image: Image.Image) -> Image.Image:
    """Converts an opened image of any mode to upright RGB; see `decode`."""
    # Unlike this, ImageOps.exif_transpose also rewrites the tags and fails on damaged ones.
    turn = UPRIGHT.get(jpeg.orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def decode_crop(data: bytes, choose_box: Callable[[int, int], Box], size: int) -> np.ndarray:
    """Decodes one part of an image; see `decode_crops`."""
    return decode_crops(data, lambda width, height: [choose_box(width, height)], size)[0]


def decode_crops(
    data: bytes, choose_boxes: Callable[[int, int], Sequence[Box]], size: int
) -> list[np.ndarray]:
    """Decodes parts of an image, quickly if it is a plain JPEG (see `jpeg.decode_parts`).

    Args:
      data: the bytes of the file.
      choose_boxes: maps (width, height) of the image to the boxes of the parts.
      size: resolution that suffices: a side of a part needs no more pixels.

    Returns:
      The parts, (H, W, 3) uint8 each.

    Raises:
      BadImage: unreadable or truncated bytes.
    """
    whole = jpeg.plain_size(data)
    if whole:
        boxes = choose_boxes(*whole)
        try:
            return jpeg.decode_parts(data, whole, boxes, size)
        except ValueError as e:
            raise BadImage(str(e)) from e
    image = decode(data)
    boxes = choose_boxes(*image.size)
    pixels = np.asarray(image)
    return [pixels[top:bottom, left:right] for left, top, right, bottom in boxes]


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """The evaluation view: resize the shorter side to floor(size / crop), crop the central square.

    The resize is bicubic. timm computes the same.

    Shapes: an RGB image of any size -> (size, size, 3) uint8.
    """

    size: int
    crop: float

    def __post_init__(self):
        if not 0 < self.crop <= 1:
            raise UserError(f"data.test_crop={self.crop} must be a fraction in (0, 1]")

    @property
    def shorter_side(self) -> int:
        """The length in pixels that the shorter side is resized to."""
        return math.floor(self.size / self.crop)

    def __call__(self, data: bytes, rng: np.random.Generator | None = None) -> np.ndarray:
        del rng
        image = decode(data)
        short = self.shorter_side
        if image.width <= image.height:
            target = (short, max(short, short * image.height // image.width))
        else:
            target = (max(short, short * image.width // image.height), short)
        left, top = (round((side - self.size) / 2) for side in target)
        square = (left, top, left + self.size, top + self.size)
        if max(target) <= LONGEST * short:
            return np.asarray(image.resize(target, Image.Resampling.BICUBIC).crop(square))
        # The whole resized image might not fit into memory.
        x, y = image.width / target[0], image.height / target[1]
        box = (square[0] * x, square[1] * y, square[2] * x, square[3] * y)
        size = (self.size, self.size)
        return np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=box))
