"""Weights that come with the package, by name."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.datasets import load_digits

import sret_jax
from sret_jax.errors import UserError
from sret_jax.tools import convert
from sret_jax.weights.packaged import FOLDER, packaged_names

NAME = "digits_small"


def test_they_are_small_and_say_what_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in packaged_names():
        assert (FOLDER / f"{name}.safetensors").stat().length < 4e6
        assert len(sret_jax.class_names(name)) > 1


def test_a_name_is_read_wherever_a_path_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, variables = sret_jax.load(NAME)
    same, weights = sret_jax.load(FOLDER / f"{NAME}.safetensors")
    assert model == same
    jax.tree.map(np.testing.assert_array_equal, variables, weights)
    convert.main([NAME, "again.safetensors"])
    written, ours = load_file("again.safetensors"), load_file(FOLDER / f"{NAME}.safetensors")
    assert written.keys() == ours.keys()
    assert all(np.array_equal(written[key], ours[key]) for key in ours)


def test_digits_small_reads_handwritten_digits():
    scans, labels = load_digits(return_X_y=True)
    images = [np.uint8(scan.reshape(8, 8, 1).repeat(3, 2) * 255 / 16) for scan in scans[:64]]
    found = sret_jax.predict(*sret_jax.load(NAME), images, test_crop=sret_jax.test_crop(NAME))
    assert np.mean(found.argmax(1) == labels[:64]) > 0.9


def test_a_folder_in_the_current_one_comes_first_and_an_unknown_name_lists_the_known(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"no file or folder .*/digit_small; .* package: .*{NAME}"):
        sret_jax.load("digit_small")
    (tmp_path / NAME).mkdir()
    with pytest.raises(UserError, match=f"{tmp_path / NAME} holds no checkpoints"):
        sret_jax.load(NAME)
