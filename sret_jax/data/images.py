"""From stored bytes to pixels, and the evaluation view. No JAX here."""

import dataclasses
import io
import warnings
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps

from sret_jax.errors import UserError

Box = tuple[int, int, int, int]  # left, top, right, bottom

EXIF_MARK = b"Exif\0\0"
LONGEST_SEGMENT = 1 << 16
LONGEST = 16  # sides, beyond which only a part of an image is resized
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # where Pillow itself refuses

# Between half of MAX_PIXELS and all of it, Pillow warns of a decompression bomb.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class BadImage(ValueError):
    """Bytes that are no readable image."""


def decode(data: bytes) -> Image.Image:
    """Decodes an image to upright RGB by what its bytes are, whatever its file was called.

    JPEG or PNG; greyscale, CMYK, palette or RGB; 16 bits are cut to the upper 8, transparency is
    left out, and EXIF's orientation is applied.

    Raises:
      BadImage: unreadable or truncated bytes, or more than 179 million pixels.
    """
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if image.mode.startswith("I"):
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, OverflowError, Image.DecompressionBombError) as e:
        raise BadImage(str(e)) from e


def decode_crop(data: bytes, choose_box: Callable[[int, int], Box], size: int) -> np.ndarray:
    """Decodes a part of an image, fast where it is a plain JPEG.

    Of a large JPEG the 1/2, 1/4 or 1/8 resolution is decoded that still has `size` pixels a side;
    the box is then widened to whole pixels of it.

    Args:
      data: the bytes of the file.
      choose_box: (width, height) of the image -> the part.
      size: how many pixels a side of the part are enough.

    Returns:
      The part, (H, W, 3) uint8.

    Raises:
      BadImage: unreadable or truncated bytes.
    """
    jpeg = _plain_jpeg_size(data)
    if jpeg:
        box = choose_box(*jpeg)
        try:
            return _decode_jpeg(data, jpeg, box, size)
        except ValueError:
            pass  # damaged, but perhaps no more than Pillow puts up with
    image = decode(data)
    left, top, right, bottom = box if jpeg else choose_box(*image.size)
    return np.asarray(image)[top:bottom, left:right]


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
        left, top = (round((side - self.size) / 2) for side in target)
        square = (left, top, left + self.size, top + self.size)
        if max(target) <= LONGEST * short:
            return np.asarray(image.resize(target, Image.Resampling.BICUBIC).crop(square))
        # The whole of it, resized, might not fit into memory.
        x, y = image.width / target[0], image.height / target[1]
        box = (square[0] * x, square[1] * y, square[2] * x, square[3] * y)
        size = (self.size, self.size)
        return np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=box))


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of an upright RGB or greyscale JPEG; None for whatever else it is."""
    if not simplejpeg.is_jpeg(data):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colorspace in ("CMYK", "YCCK") or width * height > MAX_PIXELS or _is_turned(data):
        return None
    return width, height


def _is_turned(data: bytes) -> bool:
    """Whether EXIF says that the image is stored other than upright."""
    if data.find(EXIF_MARK, 0, LONGEST_SEGMENT) < 0:
        return False
    try:
        exif = Image.open(io.BytesIO(data)).getexif()
    except (OSError, SyntaxError, ValueError):
        return False
    return exif.get(ExifTags.Base.Orientation, 1) != 1


def _decode_jpeg(data: bytes, size: tuple[int, int], box: Box, least: int) -> np.ndarray:
    left, top, right, bottom = box
    shrink = 1
    while shrink < 8 and min(right - left, bottom - top) >= 2 * shrink * least:
        shrink *= 2
    width, height = (-(-side // shrink) for side in size)
    pixels = simplejpeg.decode_jpeg(data, "RGB", min_width=width, min_height=height)
    rows = slice(top // shrink, -(-bottom // shrink))
    return pixels[rows, left // shrink : -(-right // shrink)]
