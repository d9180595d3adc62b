import jax
import numpy as np
import pytest

import sret_jax
from tests import golden


@pytest.mark.parametrize("name", [n for n in golden.MODELS if n.startswith("tiny")])
def test_published_names_and_shapes_are_ours_shared_copies_included(name):
    ours = golden.state_dict(golden.build(name))
    published = {n: tuple(shape) for n, _, shape in golden.MODELS[name]["keys"]}
    assert {n: a.shape for n, a in ours.items()} == published


@pytest.mark.parametrize("name", ["tiny_sliced", "tiny_unsliced_3_loops", "sret_s"])
def test_conversion_there_and_back_changes_nothing(name):
    model = golden.build(name)
    published = golden.state_dict(model)
    variables = sret_jax.from_torch(published, model)
    back = sret_jax.to_torch(variables, model)
    assert back.keys() == published.keys()
    for key, array in published.items():
        np.testing.assert_array_equal(back[key], array, err_msg=key)
    again = sret_jax.from_torch(back, model)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_batch_counters_are_taken_or_left():
    model = golden.build("tiny_sliced")
    published = golden.state_dict(model)
    published["patch_embed.bn1.num_batches_tracked"] = np.array(12)
    sret_jax.from_torch(published, model)


def test_everything_that_does_not_fit_is_listed_in_one_error():
    model = golden.build("tiny_sliced")
    published = golden.state_dict(model)
    del published["norm.weight"]
    published["extra"] = np.zeros(3)
    published["head.bias"] = np.zeros(11, np.float32)
    with pytest.raises(ValueError) as error:
        sret_jax.from_torch(published, model)
    message = str(error.value)
    assert "in 3 places" in message
    for part in (
        "missing norm.weight",
        "surplus extra",
        "head.bias has shape (11,), expected (10,)",
    ):
        assert part in message


def test_copies_of_a_shared_block_must_agree():
    model = golden.build("tiny_sliced")
    published = golden.state_dict(model)
    name = "transformers.0.blocks.2.attn.qkv.weight"
    published[name] = published[name] + 1
    with pytest.raises(ValueError, match=r"in 1 place: transformers.0.blocks.2.attn.qkv.weight"):
        sret_jax.from_torch(published, model)
