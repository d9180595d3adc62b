"""Stored crops: drawn from the training distribution, and reproduced to the last bit."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sret_jax.data.views.crops import CROP, UNIT, draw_views, replay_views, to_pixels, to_stored
from sret_jax.data.views.images import BadImage
from sret_jax.data.views.training_view import TrainTransform
from tests.archives import encode, photographs

LAW = TrainTransform(32, (0.02, 1.0), (3 / 4, 4 / 3), flip=0.5)
PHOTO = photographs(1, seed=0)[0]


def large_jpeg():
    file = io.BytesIO()
    PHOTO.resize((900, 700)).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize("data", [encode(PHOTO), encode(PHOTO, "PNG"), large_jpeg()])
def test_any_of_the_crops_are_replayed_to_the_last_bit(data):
    crops, views = draw_views(data, LAW, 12, seed=1, record=5)
    assert views.shape == (12, 32, 32, 3) and 0 < crops["flip"].sum() < 12
    for some in (slice(None), [3], [7, 0, 0, 11]):
        np.testing.assert_array_equal(replay_views(data, crops[some], 32), views[some])


def test_a_crop_depends_on_seed_record_and_number_alone():
    data = encode(PHOTO)
    crops, _ = draw_views(data, LAW, 8, seed=1, record=5)
    np.testing.assert_array_equal(draw_views(data, LAW, 3, seed=1, record=5)[0], crops[:3])
    for seed, record in ((2, 5), (1, 6)):
        other, _ = draw_views(data, LAW, 8, seed=seed, record=record)
        assert not set(map(bytes, other["box"])) & set(map(bytes, crops["box"]))


def test_crops_follow_the_law_of_training():
    crops, _ = draw_views(encode(PHOTO), LAW, 400, seed=0, record=0)
    left, top, right, bottom = crops["box"].T.astype(float) / UNIT
    areas = (right - left) * (bottom - top)
    assert areas.min() > 0.01 and areas.max() <= 1
    assert abs(areas.mean() - 0.51) < 0.08  # uniform in 0.02..1, but for boxes that do not fit
    assert 0.4 < crops["flip"].mean() < 0.6


@given(st.data())
def test_boxes_below_65535_pixels_are_kept_exactly(data):
    width, height = (data.draw(st.integers(1, UNIT - 1)) for _ in range(2))
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = (
        left,
        top,
        data.draw(st.integers(left + 1, width)),
        data.draw(st.integers(top + 1, height)),
    )
    assert to_pixels(to_stored(box, width, height), width, height) == box


def test_a_box_of_no_size_shows_at_least_a_pixel():
    assert to_pixels((UNIT, UNIT, UNIT, UNIT), 5, 7) == (4, 6, 5, 7)
    empty = np.zeros(1, CROP)
    assert replay_views(encode(Image.new("RGB", (5, 7))), empty, 8).shape == (1, 8, 8, 3)


def test_unreadable_bytes_are_a_bad_image():
    with pytest.raises(BadImage):
        draw_views(b"no image", LAW, 2, seed=0, record=0)
