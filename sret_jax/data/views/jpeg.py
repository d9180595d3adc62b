"""Decodes parts of a JPEG and as little else of it as possible."""

import io
import math
from collections.abc import Sequence

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

Box = tuple[int, int, int, int]  # left, top, right, bottom

ORIENTATION_MARKS = (b"Exif\0\0", b"tiff:Orientation")  # in EXIF and in XMP
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or math.inf)  # Pillow refuses larger images too
SCALES = (1, 2, 4, 8)  # scales at which the inverse transform is fast
ROWS_BELOW = 16  # rows that the colours of the last wanted rows are interpolated from

START, END = b"\xff\xd8", b"\xff\xd9"
SEQUENTIAL_FRAMES, SCAN = (0xC0, 0xC1), 0xDA
BARE = (0x00, 0x01, *range(0xD0, 0xDA), 0xFF)  # markers without a length, and fill bytes


def plain_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a complete, upright RGB or greyscale JPEG; None for any other file."""
    if not data.startswith(START) or not data.rstrip(b"\0").endswith(END):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colorspace in ("CMYK", "YCCK") or width * height > MAX_PIXELS or _is_turned(data):
        return None
    return width, height


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 is upright. An unreadable tag counts as 1."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises almost anything on damaged tags
        return 1
    return value if value in range(1, 9) else 1


def decode_parts(
    data: bytes, size: tuple[int, int], boxes: Sequence[Box], least: int
) -> list[np.ndarray]:
    """Decodes parts of a plain JPEG. The pixels of a part do not depend on the other parts.

    Rows below the parts are not decoded. A large image is decoded at a lower resolution, at which
    a part still has `least` pixels a side; its box is widened to whole pixels of that resolution.

    Args:
      data: the bytes of the file.
      size: from `plain_size`.
      boxes: the parts, in pixels of the image.
      least: number of pixels a side that suffices.

    Returns:
      The parts, (H, W, 3) uint8 each.

    Raises:
      ValueError: damaged data.
    """
    scales = [scale_for(box, least) for box in boxes]
    pixels = {}
    for scale in set(scales):  # nearly always a single one
        bottom = max(box[3] for box, of in zip(boxes, scales, strict=True) if of == scale)
        pixels[scale] = _decode_above(data, size, bottom, scale)
    parts = []
    for box, scale in zip(boxes, scales, strict=True):
        left, top, right, bottom = (side // scale for side in widened(box, scale))
        parts.append(pixels[scale][top:bottom, left:right])
    return parts


def scale_for(box: Box, least: int) -> int:
    """The largest of 1, 2, 4 and 8 at which the box still has `least` pixels a side."""
    left, top, right, bottom = box
    side = min(right - left, bottom - top)
    return max(scale for scale in SCALES if scale == 1 or side >= scale * least)


def widened(box: Box, scale: int) -> Box:
    """The smallest box that contains this one and whose sides are multiples of `scale`."""
    left, top, right, bottom = box
    return (
        left // scale * scale,
        top // scale * scale,
        -(-right // scale) * scale,
        -(-bottom // scale) * scale,
    )


def _decode_above(data: bytes, size: tuple[int, int], bottom: int, scale: int) -> np.ndarray:
    """Decodes at least the rows above `bottom`, at 1 / scale of the resolution."""
    width, height = size
    if bottom + ROWS_BELOW < height:
        data, height = _cut_below(data, bottom + ROWS_BELOW, height)
    return simplejpeg.decode_jpeg(
        data, "RGB", min_width=-(-width // scale), min_height=-(-height // scale), strict=False
    )


def _is_turned(data: bytes) -> bool:
    """Whether EXIF or XMP contains another orientation than upright."""
    _, scan = _layout(data)
    if not any(mark in data[:scan] for mark in ORIENTATION_MARKS):
        return False
    try:
        return orientation(Image.open(io.BytesIO(data), formats=("JPEG",))) != 1
    except Exception:  # Pillow raises almost anything on damaged headers
        return True


def _cut_below(data: bytes, rows: int, height: int) -> tuple[bytes, int]:
    """Writes `rows` into the header as the height, if all components share one scan.

    JPEG stores rows from top to bottom, so a decoder then stops there and skips the rest.

    Returns:
      The bytes, and the height that their header now contains.
    """
    frame, scan = _layout(data)
    if frame is None or data[scan] != data[frame + 5]:
        return data, height
    return data[: frame + 1] + rows.to_bytes(2, "big") + data[frame + 3 :], rows


def _layout(data: bytes) -> tuple[int | None, int]:
    """Where the contents of the sequential frame header and of the scan begin.

    The first is None if the frame is not sequential. If the header has more than segments, the
    result is None and the length of the data.
    """
    frame, position = None, len(START)
    while position + 8 < len(data) and data[position] == 0xFF:
        marker, contents = data[position + 1], position + 4
        if marker == SCAN:
            return frame, contents
        if marker in BARE:
            break
        if marker in SEQUENTIAL_FRAMES:
            frame = contents
        position += 2 + int.from_bytes(data[position + 2 : contents], "big")
    return None, len(data)
