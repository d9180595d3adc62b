import io

import numpy as np
import pytest
from PIL import Image

from sret_jax.data.images import BadImage, EvalTransform, decode
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


def test_a_crop_share_out_of_range_is_named():
    with pytest.raises(UserError, match="data.test_crop=0"):
        EvalTransform(8, 0)
