"""An untied model in a file becomes a recursive one, and is unrolled again."""

import re

import jax
import numpy as np
import pytest
from etils import epath

import sret_jax
from sret_jax.tools import recur, unroll
from sret_jax.weights.description import Description
from sret_jax.weights.writing import write_weights
from tests.conftest import refusal
from tests.explicit import distinct_weights

SIZES = dict(num_classes=5, image_size=16, blocks=(4,), heads=(2,), dim=4, patch_size=8)


@pytest.fixture(scope="module")
def untied_file(tmp_path_factory):
    """A file with the weights of a tiny untied DeiT."""
    model = sret_jax.create_model("deit_tiny", **SIZES)
    file = epath.Path(tmp_path_factory.mktemp("deit")) / "w.safetensors"
    weights = jax.tree.map(np.float32, distinct_weights(model))
    write_weights(file, model, weights, Description.of(model, "deit_tiny", list("abcde"), 0.9), "")
    return file


def test_a_recursive_model_of_full_rank_is_the_untied_one_and_is_unrolled_to_it(
    untied_file, tmp_path, capsys
):
    tied, plain = tmp_path / "tied", tmp_path / "plain.safetensors"
    recur.main([str(untied_file), str(tied), "--loops=2", "--lora=8"])
    said = capsys.readouterr().out
    changes = dict(re.findall(r"^(stage 1, layer \d|logits) +(\S+)$", said, re.MULTILINE))
    assert [*changes] == ["stage 1, layer 1", "stage 1, layer 2", "stage 1, layer 3",
                          "stage 1, layer 4", "logits"]  # fmt: skip
    assert all(float(change) < 1e-5 for change in changes.values())
    assert "stays the same for 10 of 10 images" in said
    model, _ = sret_jax.load(tied)
    assert (model.blocks, model.loops) == ((2,), 2)
    assert f'--config.model.adapters="{model.adapters}"' in said

    unroll.main([str(tied), str(plain)])
    said = capsys.readouterr().out
    assert float(re.search(r"Logits of 10 photographs differ by (\S+)\.$", said, re.M)[1]) < 1e-4
    (before, weights), (after, again) = sret_jax.load(untied_file), sret_jax.load(plain)
    assert before == after
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), weights, again)
    assert sret_jax.class_names(plain) == list("abcde") and sret_jax.test_crop(plain) == 0.9


def test_what_cannot_be_made_recursive_or_unrolled_is_a_sentence(untied_file, tmp_path, capsys):
    for command, flags, sentence in (
        (recur, ("--loops=3",), "loops=3 must be at least 2 and divide the (4,) layers"),
        (recur, ("--lora=9",), "'lora:9' has rank 9, but attn/"),
        (recur, ("--lora=-1",), "--lora=-1 must be a rank of at least 1"),
        (recur, ("--images", "none.png"), "there is no image or folder none.png"),
        (unroll, (), "w.safetensors: it is untied already"),
    ):
        error = refusal(capsys, command.main, untied_file, tmp_path / "out", *flags)
        assert sentence in error, error
    assert not (tmp_path / "out").exists()
