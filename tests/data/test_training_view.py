import numpy as np
import pytest
from PIL import Image

from sret_jax.data.training_view import TrainTransform
from sret_jax.errors import UserError
from tests.archives import encode


def test_training_crops_have_the_area_aspect_and_flips_that_were_asked_for():
    transform = TrainTransform(8, (0.08, 1.0), (3 / 4, 4 / 3), 0.5)
    rng = np.random.default_rng(0)
    boxes = np.array([transform.sample_box(400, 400, rng) for _ in range(4000)])
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
    box = transform.sample_box(1000, 10, np.random.default_rng(0))
    assert box == (493, 0, 506, 10)


def test_settings_out_of_range_are_named():
    with pytest.raises(UserError, match=r"augment.crop_scale=\(0.5, 0.2\)"):
        TrainTransform(8, (0.5, 0.2), (1, 1), 0.5)
    with pytest.raises(UserError, match="augment.flip=1.5"):
        TrainTransform(8, (0.5, 1), (1, 1), 1.5)
