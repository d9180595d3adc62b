import ast
import pathlib

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from sret_jax.benchmarks.input_benchmark import exact_view, psnr
from sret_jax.data.views import jpeg
from sret_jax.data.views.images import decode
from sret_jax.data.views.training_view import TrainTransform, jitter_colors, resize, three_augment
from sret_jax.errors import UserError
from tests.archives import encode, photographs

CROP = ((0.08, 1.0), (3 / 4, 4 / 3))


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

    # A horizontal ramp shows whether a crop was flipped.
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


def torchvision_boxes(count, width, height, rng):
    """RandomResizedCrop's boxes as torchvision samples them, as (w, h, left, top)."""
    boxes = []
    while len(boxes) < count:
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            boxes.append((w, h, rng.integers(width - w + 1), rng.integers(height - h + 1)))
    return np.array(boxes)


@pytest.mark.parametrize("size", [(500, 375), (300, 400)])
def test_crops_have_torchvisions_distribution_of_area_aspect_and_place(size):
    rng = np.random.default_rng(1)
    transform = TrainTransform(224, *CROP)
    ours = np.array([transform.sample_box(*size, rng) for _ in range(6000)])
    w, h = ours[:, 2] - ours[:, 0], ours[:, 3] - ours[:, 1]
    theirs = torchvision_boxes(6000, *size, np.random.default_rng(2))
    for a, b in (
        (w * h, theirs[:, 0] * theirs[:, 1]),
        (w / h, theirs[:, 0] / theirs[:, 1]),
        (ours[:, 0], theirs[:, 2]),
        (ours[:, 1], theirs[:, 3]),
    ):
        assert stats.ks_2samp(a, b).pvalue > 1e-3


def test_the_view_is_near_exact_decoding_and_pillows_bicubic():
    transform = TrainTransform(224, *CROP)
    ratios = []
    for i, photo in enumerate(photographs(40, seed=5)):
        data = encode(photo)
        box = transform.sample_box(*photo.size, np.random.default_rng(i))
        exact = exact_view(decode(data), box, 224)
        ratios.append(psnr(transform.view(data, np.random.default_rng(i)), exact))
    assert np.median(ratios) > 40  # 35 is what must hold
    assert min(ratios) > 32


@pytest.mark.parametrize("side", [100, 224, 300, 448, 1000])
def test_resizing_is_near_pillows_bicubic_at_every_scale(side):
    photo = photographs(1, seed=6)[0].resize((side, side - 3), Image.Resampling.BICUBIC)
    exact = np.asarray(photo.resize((224, 224), Image.Resampling.BICUBIC))
    assert psnr(resize(np.asarray(photo), 224), exact) > 38


@pytest.mark.parametrize("size", [224, 64])
def test_large_images_are_read_at_a_lower_resolution_and_look_the_same(size):
    transform = TrainTransform(size, *CROP)
    ratios = []
    for i, photo in enumerate(photographs(10, seed=7)):
        data = encode(photo.resize((1600, 1200), Image.Resampling.BICUBIC))
        box = transform.sample_box(1600, 1200, np.random.default_rng(i))
        read = jpeg.widened(box, jpeg.scale_for(box, size))
        exact = exact_view(decode(data), read, size)
        ratios.append(psnr(transform.view(data, np.random.default_rng(i)), exact))
    assert np.median(ratios) > 35


def test_three_augment_draws_its_three_operations_equally_often():
    photo = np.array(photographs(1, seed=8)[0].resize((32, 32)))
    rng = np.random.default_rng(0)
    counts = np.zeros(3, int)
    for _ in range(900):
        view = three_augment(photo, rng).astype(int)
        grey = np.ptp(view, axis=2).max() == 0
        solarized = np.array_equal(view, np.where(photo < 128, photo, 255 - photo))
        counts += [grey, solarized, not grey and not solarized]
    assert counts.sum() == 900
    assert stats.chisquare(counts).pvalue > 1e-3


def test_three_augment_blurs_by_at_most_two_pixels():
    point = np.zeros((33, 33, 3), np.uint8)
    point[16, 16] = 255
    rng = np.random.default_rng(0)
    centre = np.array([three_augment(point, rng)[16, 16, 0] for _ in range(300)])
    centre = centre[(centre > 0) & (centre < 255)]  # neither solarized nor merely grey
    assert centre.min() >= 255 / (2 * np.pi * 2.0**2) - 1.5
    assert len(np.unique(centre)) > 20


def test_colour_jitter_scales_brightness_within_its_spread():
    grey = np.full((8, 8, 3), 100, np.uint8)  # contrast and saturation leave a flat grey alone
    rng = np.random.default_rng(0)
    levels = np.array([jitter_colors(grey, 0.3, rng)[0, 0, 0] for _ in range(2000)])
    assert stats.kstest(levels + rng.uniform(0, 1, 2000), stats.uniform(70, 60).cdf).pvalue > 1e-3


def test_a_policy_is_applied_after_the_crop_and_flip():
    data = encode(photographs(1, seed=9)[0])
    plain = TrainTransform(64, *CROP, flip=0.5)
    full = TrainTransform(64, *CROP, flip=0.5, policy="rand-m9-p1-inc1", color_jitter=0.3)
    view = plain(data, np.random.default_rng(3))
    np.testing.assert_array_equal(full.view(data, np.random.default_rng(3)), view)
    assert not np.array_equal(full(data, np.random.default_rng(3)), view)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(policy="rnd-m9"), "unknown policy 'rnd-m9'; did you mean 'rand-m9"),
        (dict(policy="tree"), "unknown policy 'tree'; did you mean 'three'"),
        (dict(color_jitter=-0.1), "augment.color_jitter=-0.1 must be a number in"),
        (dict(flip=2), "augment.flip=2 must be a number in"),
    ],
)
def test_a_mistake_in_a_policy_is_named(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        TrainTransform(8, *CROP, **settings)


REFERENCE = pathlib.Path(__file__).parent.parent / "augment.npz"


def test_crops_are_near_the_reference_resizes():
    with np.load(REFERENCE) as arrays:
        image = arrays["image"]
        keys = [key for key in arrays if key.startswith("resize_bicubic/")]
        assert len(keys) == 3
        for key in keys:
            left, top, right, bottom = ast.literal_eval(key.split("/")[1])
            assert psnr(resize(image[top:bottom, left:right], len(arrays[key])), arrays[key]) > 30
