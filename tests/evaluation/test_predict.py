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
from sret_jax.models.apply import normalise


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
    assert first.shape == (5,) and isinstance(second, UnreadableImage)
    assert "number 1" in str(second) and asked == BATCH
    third = sret_jax.predict(*model_and_variables, [np.full((32, 32, 3), 2, np.uint8)])
    np.testing.assert_allclose(next(rows), third[0], atol=1e-5)
    assert len(list(rows)) == 3 * BATCH - 3
