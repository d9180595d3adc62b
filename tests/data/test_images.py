import io

import numpy as np
import pytest
from PIL import Image

from sret_jax.data.images import BadImage, EvalTransform, TrainTransform, decode
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


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (256, 256), (300, 1200), (90, 60)])
def test_evaluation_view_is_pillows_bicubic_and_the_central_square(size):
    photo = photographs(1, seed=2)[0].resize(size)
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    view = EvalTransform(224, 0.875)(buffer.getvalue())

    width, height = size
    scale = 256 / min(size)
    target = (256, int(height * scale)) if width <= height else (int(width * scale), 256)
    resized = photo.resize(target, Image.Resampling.BICUBIC)
    left, top = round((target[0] - 224) / 2), round((target[1] - 224) / 2)
    expected = np.asarray(resized)[top : top + 224, left : left + 224]
    np.testing.assert_array_equal(view, expected)


def test_training_crops_have_the_area_aspect_and_flips_that_were_asked_for():
    transform = TrainTransform(8, (0.08, 1.0), (3 / 4, 4 / 3), 0.5)
    rng = np.random.default_rng(0)
    boxes = np.array([transform._sample_box(400, 400, rng) for _ in range(4000)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes[:, 2:].max() <= 400
    ratios, shares = widths / heights, widths * heights / 400**2
    assert ratios.min() > 0.74 and ratios.max() < 1.35
    assert np.mean(np.log(ratios)) == pytest.approx(0, abs=0.02)
    assert shares.min() > 0.079 and shares.max() <= 1
    # Uniform on [0.08, 1], less the largest boxes, many of which do not fit and are drawn again.
    assert np.mean(shares) == pytest.approx(0.50, abs=0.03)

    # A horizontal ramp tells whether a crop was flipped.
    ramp = np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (48, 1, 3))
    png = encode(Image.fromarray(ramp), "PNG")
    crops = [transform(png, np.random.default_rng(i)).astype(int) for i in range(400)]
    flipped = np.mean([crop[0, 0, 0] > crop[0, -1, 0] for crop in crops])
    assert flipped == pytest.approx(0.5, abs=0.07)


def test_an_image_no_box_fits_gives_its_largest_central_box():
    transform = TrainTransform(8, (0.9, 1.0), (3 / 4, 4 / 3), 0.0)
    box = transform._sample_box(1000, 10, np.random.default_rng(0))
    assert box == (493, 0, 506, 10)


def test_settings_out_of_range_are_named():
    with pytest.raises(UserError, match=r"data.crop_scale=\(0.5, 0.2\)"):
        TrainTransform(8, (0.5, 0.2), (1, 1), 0.5)
    with pytest.raises(UserError, match="data.flip=1.5"):
        TrainTransform(8, (0.5, 1), (1, 1), 1.5)
    with pytest.raises(UserError, match="data.test_crop=0"):
        EvalTransform(8, 0)
