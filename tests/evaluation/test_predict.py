"""Probabilities of pictures in all accepted forms."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import ExifTags, Image

import sret_jax
from sret_jax.data.views.images import EvalTransform
from sret_jax.errors import UserError
from sret_jax.evaluation.predict import BATCH, UnreadableImage, predict_each
from sret_jax.models.apply import evaluation_logits, exit_signals, normalise
from sret_jax.models.loops import with_loops


@pytest.fixture(scope="module")
def model_and_variables():
    model = sret_jax.create_model(
        "sret_t", image_size=32, num_classes=5, blocks=(1, 1), heads=(2, 4), dim=8, groups=None
    )
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def test_every_form_of_a_picture_gives_the_softmax_of_its_evaluation_view(
    model_and_variables, tmp_path
):
    model, variables = model_and_variables
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (50, 40, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "image.png")
    png = io.BytesIO()
    image.save(png, format="PNG")
    forms = [str(tmp_path / "image.png"), tmp_path / "image.png", png.getvalue(), image, pixels]
    found = sret_jax.predict(model, variables, forms, test_crop=0.8)
    view = EvalTransform(32, 0.8)(png.getvalue())
    logits = model.apply(variables, normalise(model, view[None]), train=False)
    np.testing.assert_allclose(found, np.repeat(jax.nn.softmax(logits), 5, axis=0), atol=1e-5)


def test_an_opened_picture_is_seen_as_its_file_is(model_and_variables, tmp_path):
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    ramp = np.tile(np.arange(0, 65536, 1024, dtype=np.uint16), (40, 1))
    Image.fromarray(ramp).save(tmp_path / "16 bits.png", exif=turned)
    of_file, opened = sret_jax.predict(
        *model_and_variables,
        [tmp_path / "16 bits.png", Image.open(tmp_path / "16 bits.png")],
    )
    np.testing.assert_allclose(opened, of_file, atol=1e-7)


def test_rows_keep_their_order_beyond_one_batch_and_no_image_gives_no_row(model_and_variables):
    model, variables = model_and_variables
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH + 3, 32, 32, 3), np.uint8)
    many = sret_jax.predict(model, variables, pixels, test_crop=1.0)
    last = sret_jax.predict(model, variables, pixels[-1:], test_crop=1.0)
    assert many.shape == (BATCH + 3, 5)
    np.testing.assert_allclose(many[-1:], last, atol=1e-5)
    assert sret_jax.predict(model, variables, []).shape == (0, 5)


@pytest.mark.parametrize(
    "picture",
    [
        b"no image",
        "missing.png",
        3,
        np.zeros((2, 2, 3), np.float64),
        np.zeros((32, 3), np.uint8),  # a row of an image that was not put into a list
    ],
)
def test_what_is_no_picture_is_said_in_a_sentence(picture, model_and_variables):
    with pytest.raises(UserError, match=r"^image .* cannot be read .*; give a path, bytes"):
        sret_jax.predict(*model_and_variables, [picture])


def test_one_image_that_is_no_list_is_refused(model_and_variables):
    for image in ("image.png", b"bytes", Image.new("RGB", (4, 4))):
        with pytest.raises(UserError, match=r"one image, not several; give a list"):
            sret_jax.predict(*model_and_variables, image)


def test_images_are_read_as_they_are_asked_for_and_unreadable_ones_keep_their_place(
    model_and_variables,
):
    asked = 0

    def images():
        nonlocal asked
        for i in range(3 * BATCH):
            asked += 1
            yield b"no image" if i == 1 else np.full((32, 32, 3), i, np.uint8)

    rows = predict_each(*model_and_variables, images(), test_crop=1.0)
    first, second = next(rows), next(rows)
    assert first.probabilities.shape == (5,) and isinstance(second, UnreadableImage)
    assert "number 1" in str(second) and asked == BATCH
    third = sret_jax.predict(*model_and_variables, [np.full((32, 32, 3), 2, np.uint8)])
    np.testing.assert_allclose(next(rows).probabilities, third[0], atol=1e-5)
    assert len(list(rows)) == 3 * BATCH - 3


def test_with_a_rule_each_picture_leaves_after_its_own_number_of_loops():
    model = sret_jax.create_model(
        "deit_tiny", image_size=16, patch_size=8, num_classes=5, blocks=(1,), loops=2, heads=(2,)
    )
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    images = normalise(model, pixels)
    entropy = np.sort(jax.jit(exit_signals, static_argnums=0)(model, variables, images).entropy[0])
    between = float(entropy[2] + entropy[3]) / 2  # half of the images leave after the first loop
    rule = f"entropy:{between!r}"
    found = list(predict_each(model, variables, pixels, test_crop=1.0, exit=rule))
    assert sorted(row.loops for row in found) == [1, 1, 1, 2, 2, 2]
    exits = [evaluation_logits(*with_loops(model, variables, n), images) for n in (1, 2)]
    for i, row in enumerate(found):
        expected = jax.nn.softmax(exits[row.loops - 1][i])
        np.testing.assert_allclose(row.probabilities, expected, atol=1e-5)
    np.testing.assert_array_equal(
        sret_jax.predict(model, variables, pixels, test_crop=1.0, exit=rule),
        [row.probabilities for row in found],
    )
    with pytest.raises(UserError, match="unknown exit rule 'entropi'"):
        sret_jax.predict(model, variables, pixels, exit="entropi:1")
