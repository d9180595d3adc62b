import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from sret_jax.data.views.images import BadImage, EvalTransform, decode, decode_crop
from sret_jax.data.views.training_view import TrainTransform
from sret_jax.errors import UserError
from tests.archives import encode, photographs


@pytest.mark.parametrize(
    ("form", "mode"),
    [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "P"), ("PNG", "L")],
)
def test_any_stored_form_decodes_to_rgb_near_the_photograph(form, mode):
    photo = photographs(1, seed=0)[0]
    decoded = np.asarray(decode(encode(photo, form, mode)), np.float32)
    assert decoded.shape == (*photo.size[::-1], 3)
    reference = photo.convert("L").convert("RGB") if mode == "L" else photo
    error = np.abs(decoded - np.asarray(reference, np.float32)).mean()
    assert error < (20 if mode == "P" else 12)  # a palette is coarser than JPEG


@pytest.mark.parametrize("data", [b"", b"no image", encode(photographs(1, 0)[0])[:2000]])
def test_unreadable_or_truncated_bytes_are_a_bad_image(data):
    with pytest.raises(BadImage):
        decode(data)


AS_TIMM = [(224, 0.875, 256), (384, 0.875, 438), (512, 0.875, 585), (224, 0.9, 248)]


@pytest.mark.parametrize(("size", "crop", "short"), AS_TIMM)
@pytest.mark.parametrize("stored", [(500, 375), (375, 500), (256, 256), (300, 1200), (90, 60)])
def test_evaluation_view_is_pillows_bicubic_and_the_central_square(stored, size, crop, short):
    photo = photographs(1, seed=2)[0].resize(stored)
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    view = EvalTransform(size, crop)(buffer.getvalue())

    width, height = stored
    target = (
        (short, int(short * height / width))
        if width <= height
        else (int(short * width / height), short)
    )
    resized = photo.resize(target, Image.Resampling.BICUBIC)
    left, top = round((target[0] - size) / 2), round((target[1] - size) / 2)
    expected = np.asarray(resized)[top : top + size, left : left + size]
    np.testing.assert_array_equal(view, expected)


def test_a_crop_share_out_of_range_is_named():
    with pytest.raises(UserError, match="data.test_crop=0"):
        EvalTransform(8, 0)


def sixteen_bit_png():
    ramp = np.tile(np.arange(0, 65536, 256, dtype=np.uint16), (8, 1))
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "PNG")
    return buffer.getvalue()


def test_sixteen_bits_keep_their_upper_eight():
    pixels = np.asarray(decode(sixteen_bit_png()))
    np.testing.assert_array_equal(pixels[0, :, 0], np.arange(256))
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_left_out(mode):
    photo = photographs(1, seed=0)[0].convert(mode)
    photo.putalpha(40)
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    expected = np.asarray(photographs(1, seed=0)[0].convert(mode[:-1]).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode(buffer.getvalue())), expected)


def test_a_palette_with_transparency_decodes_without_a_warning(recwarn):
    photo = photographs(1, seed=0)[0].convert("P")
    buffer = io.BytesIO()
    photo.save(buffer, "PNG", transparency=bytes(range(256)))
    expected = np.asarray(photo.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode(buffer.getvalue())), expected)
    assert not recwarn


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(orientation, form):
    photo = photographs(1, seed=0)[0]
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    photo.save(buffer, form, exif=exif.tobytes())
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(buffer.getvalue()))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(decode(buffer.getvalue())), np.asarray(upright))
    whole = decode_crop(buffer.getvalue(), lambda w, h: (0, 0, w, h), 1000)
    np.testing.assert_array_equal(whole, np.asarray(upright))
    assert (upright.size == photo.size) == (orientation < 5)


def damaged_jpeg():
    """A JPEG with overwritten bytes in the middle, which Pillow tolerates."""
    data = bytearray(encode(photographs(1, seed=0)[0]))
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(range(40))
    return bytes(data)


WILD = {
    "one pixel": encode(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"),
    "one pixel JPEG": encode(Image.new("RGB", (1, 1), (9, 8, 7))),
    "twenty thousand wide": encode(Image.new("RGB", (20_000, 40), (9, 8, 7))),
    "twenty thousand wide, one high": encode(Image.new("RGB", (20_000, 1), (9, 8, 7)), "PNG"),
    "sixteen bits": sixteen_bit_png(),
    "damaged": damaged_jpeg(),
    "GIF": encode(photographs(1, seed=0)[0], "GIF", "P"),
    "WebP": encode(photographs(1, seed=0)[0], "WEBP"),
}


@pytest.mark.parametrize("name", WILD)
def test_strange_images_have_a_training_view_and_an_evaluation_view(name):
    train = TrainTransform(32, (0.08, 1.0), (3 / 4, 4 / 3), 0.5, "rand-m9-mstd0.5-inc1")
    for i in range(5):
        view = train(WILD[name], np.random.default_rng(i))
        assert view.shape == (32, 32, 3) and view.dtype == np.uint8
    assert EvalTransform(32, 0.875)(WILD[name]).shape == (32, 32, 3)


def test_a_very_long_image_is_evaluated_by_its_centre():
    long = Image.new("RGB", (20_000, 40), (0, 0, 0))
    long.paste((255, 255, 255), (10_000, 0, 20_000, 40))
    view = EvalTransform(32, 0.875)(encode(long, "PNG")).astype(int)
    assert view[:, :14].max() < 10 and view[:, 18:].min() > 245


def test_more_pixels_than_memory_should_hold_are_a_bad_image():
    huge = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(huge, "PNG")
    with pytest.raises(BadImage, match="decompression bomb"):
        decode(huge.getvalue())


@pytest.mark.parametrize("data", [b"", b"no image", encode(photographs(1, 0)[0])[:2000]])
def test_unreadable_bytes_are_a_bad_image_in_training_too(data):
    with pytest.raises(BadImage):
        decode_crop(data, lambda w, h: (0, 0, w, h), 32)


def test_damaged_exif_hides_no_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description long enough to be stored elsewhere"
    buffer = io.BytesIO()
    photographs(1, seed=0)[0].save(buffer, "JPEG", exif=exif.tobytes())
    data = buffer.getvalue()
    start = data.index(exif.tobytes()[6:40])
    rng = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(data)
        for i in rng.integers(start, start + 34, 2):
            changed[i] = rng.integers(256)
        assert decode_crop(bytes(changed), lambda w, h: (0, 0, w, h), 1000).shape[2] == 3


def test_orientation_far_into_the_header_counts_in_training_as_in_evaluation():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    photographs(1, seed=0)[0].save(buffer, "JPEG", exif=exif.tobytes())
    segment = b"\xff\xe2" + (20_002).to_bytes(2, "big") + bytes(20_000)
    data = buffer.getvalue()
    data = data[:2] + segment + data[2:]
    upright = decode(data)
    assert upright.size == photographs(1, seed=0)[0].size[::-1]
    whole = decode_crop(data, lambda w, h: (0, 0, w, h), 1000)
    np.testing.assert_array_equal(whole, np.asarray(upright))
