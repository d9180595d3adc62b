"""Every operation against Pillow's output.

augment.npz contains a 96x72 image and Pillow 13.0.0's results (bicubic, fill 124, 116, 104) for
each operation and argument in augment.json, which also lists timm's level for the argument.
"""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from sret_jax.benchmarks.pillow_view import apply_pillow
from sret_jax.data.views import pixels as ops
from sret_jax.data.views.randaugment import INCREASING
from tests.archives import photographs

DATA = pathlib.Path(__file__).parent.parent
REFERENCE = json.loads((DATA / "augment.json").read_text())["ops"]
EXACT = {  # whole-number arithmetic
    "AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing",
    "SolarizeAdd", "ContrastIncreasing", "BrightnessIncreasing",
}  # fmt: skip


@pytest.fixture(scope="module")
def arrays():
    with np.load(DATA / "augment.npz") as file:
        return dict(file)


def check_equal(name, ours, theirs):
    error = np.abs(ours.astype(int) - theirs)
    assert error.max() <= (0 if name in EXACT else 1)
    assert ours.dtype == np.uint8 and ours.shape == theirs.shape


@pytest.mark.parametrize("case", REFERENCE, ids=lambda c: c["key"])
def test_every_operation_equals_the_reference(case, arrays):
    ours = INCREASING[case["op"]].apply(arrays["image"].copy(), *case["args"])
    check_equal(case["op"], ours, arrays[case["key"]])


@pytest.mark.parametrize("name", INCREASING)
def test_every_operation_equals_pillow_on_a_photograph_at_drawn_levels(name):
    operation = INCREASING[name]
    rng = np.random.default_rng(0)
    for image in photographs(6, seed=4):
        level = rng.uniform(-1, 1) if operation.signed else rng.uniform()
        argument = () if operation.argument is None else (operation.argument(level),)
        ours = operation.apply(np.array(image), *argument)
        check_equal(name, ours, np.asarray(apply_pillow(name, image, *argument)))


@pytest.mark.parametrize("name", INCREASING)
def test_operations_leave_their_input_as_it_was(name):
    operation = INCREASING[name]
    image = np.array(photographs(1, seed=1)[0])
    before = image.copy()
    operation.apply(image, *(() if operation.argument is None else (operation.argument(0.9),)))
    np.testing.assert_array_equal(image, before)


def test_no_bits_at_all_are_black():
    assert INCREASING["PosterizeIncreasing"].argument(1.0) == 0
    assert not ops.posterize(np.full((2, 2, 3), 255, np.uint8), 0).any()


@pytest.mark.parametrize("name", INCREASING)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (5, 1)])
def test_operations_take_the_smallest_images_and_flat_ones(name, shape):
    operation = INCREASING[name]
    flat = np.full((*shape, 3), 77, np.uint8)
    argument = () if operation.argument is None else (operation.argument(0.9),)
    ours = operation.apply(flat, *argument)
    theirs = np.asarray(apply_pillow(name, Image.fromarray(flat), *argument))
    check_equal(name, ours, theirs)
