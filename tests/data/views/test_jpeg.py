"""Decoding a part of a JPEG gives the same pixels as decoding all of it."""

import io

import numpy as np
import pytest
from PIL import Image

from sret_jax.data.views import jpeg
from tests.archives import photographs

PHOTO = photographs(1, seed=3)[0].resize((331, 290))
FORMS = {
    "4:2:0": dict(subsampling=2),
    "4:4:4": dict(subsampling=0),
    "progressive": dict(progressive=True),
    "restart markers": dict(restart_marker_rows=1),
    "optimized": dict(optimize=True),
}


def encode(image=PHOTO, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, **options)
    return buffer.getvalue()


def whole(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("box", [(0, 0, 331, 290), (17, 5, 120, 90), (200, 31, 331, 270)])
def test_a_part_is_exactly_that_part_of_the_whole(form, box):
    data = encode(**FORMS[form])
    left, top, right, bottom = box
    (part,) = jpeg.decode_parts(data, jpeg.plain_size(data), [box], least=224)
    np.testing.assert_array_equal(part, whole(data)[top:bottom, left:right])


def test_parts_come_out_the_same_together_as_alone():
    data, size = encode(), PHOTO.size
    rng = np.random.default_rng(0)
    corners = [np.sort(rng.choice(290, (2, 2), replace=False), axis=0) for _ in range(20)]
    boxes = [(*map(int, first), *map(int, last)) for first, last in corners]
    assert len({jpeg.scale_for(box, 30) for box in boxes}) > 1
    for box, part in zip(boxes, jpeg.decode_parts(data, size, boxes, 30), strict=True):
        np.testing.assert_array_equal(part, jpeg.decode_parts(data, size, [box], 30)[0])


def test_greyscale_becomes_rgb():
    data = encode(PHOTO.convert("L"))
    assert jpeg.plain_size(data) == PHOTO.size
    (part,) = jpeg.decode_parts(data, PHOTO.size, [(3, 4, 60, 50)], least=224)
    np.testing.assert_array_equal(part, whole(data)[4:50, 3:60])


@pytest.mark.parametrize(("least", "scale"), [(100, 1), (70, 2), (35, 4), (15, 8), (5, 8)])
def test_of_a_large_image_the_smallest_sufficient_resolution_is_decoded(least, scale):
    data = encode()
    box = (8, 16, 8 + 144, 16 + 160)
    (part,) = jpeg.decode_parts(data, PHOTO.size, [box], least)
    assert part.shape == (160 // scale, 144 // scale, 3)
    # Means of scale x scale pixels, as the low frequencies of each block give them.
    exact = whole(data)[16:176, 8:152].astype(float)
    means = exact.reshape(160 // scale, scale, 144 // scale, scale, 3).mean((1, 3))
    assert np.abs(part - means).mean() < 4


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8\xff\xd9",
        encode()[:3000],
        encode(PHOTO.convert("CMYK")),
        encode(exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
    ],
    ids=["nothing", "no image", "truncated", "CMYK", "turned by EXIF"],
)
def test_what_is_no_plain_jpeg_is_left_to_pillow(data):
    assert jpeg.plain_size(data) is None


def test_exif_that_leaves_an_image_upright_is_no_obstacle():
    exif = Image.Exif()
    exif[0x0112] = 1
    assert jpeg.plain_size(encode(exif=exif.tobytes())) == PHOTO.size
