"""Attention maps of every application, for attention in slices, in windows and of a class token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sret_jax
from sret_jax.models.attention_maps import attention_maps
from tests.explicit import distinct_weights
from tests.timm_models import images

SIZES = dict(num_classes=5, image_size=16, loops=3, heads=(2,), dim=4)


@pytest.mark.parametrize(
    ("name", "own", "side"),
    [
        ("deit_tiny", dict(blocks=(2,), patch_size=4), 4),
        ("deit_tiny", dict(blocks=(1,), patch_size=4, groups=((4, 2),)), 4),
        ("swin_tiny", dict(blocks=(2,), window=2), 4),
        ("sret_t", dict(blocks=(1,), groups=((4, 2),), stem_stride=4), 4),
    ],
)
def test_there_is_a_map_of_each_application_and_attention_to_all_alike_is_1(name, own, side):
    model = sret_jax.create_model(name, **SIZES, **own)
    weights = jax.jit(model.init)(jax.random.key(0), images(16).astype(np.float32))
    maps = attention_maps(model, weights, jnp.asarray(images(16), jnp.float32))
    assert len(maps) == sum(model.blocks) * model.loops
    assert len({array.tobytes() for array in maps}) == len(maps)  # each application its own
    if name != "deit_tiny":  # all attention of a slice or window goes to its tokens
        assert {array.shape for array in maps} == {(2, side, side)}
        np.testing.assert_allclose([array.mean() for array in maps], 1, rtol=1e-5)

    def without_queries(path, leaf):
        keys = jax.tree_util.keystr(path)
        return leaf * ("qkv" not in keys and "position_bias" not in keys)

    even = attention_maps(
        model, jax.tree_util.tree_map_with_path(without_queries, weights), images(16)
    )
    np.testing.assert_allclose(even, 1, rtol=1e-5)


def test_the_map_of_the_first_application_is_that_of_its_queries_and_keys(float64):
    model = sret_jax.create_model("deit_tiny", blocks=(1,), patch_size=8, **SIZES, dtype=np.float64)
    weights = distinct_weights(model)
    first = attention_maps(model, weights, images(16))[0]
    seen = model.apply(weights, images(16), lambda before, x: before, method="observed")
    x = np.asarray(seen[0][0])  # (2, 5, 8)
    block = weights["params"]["stage0_block0"]["block"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = x * block["norm1"]["scale"] + block["norm1"]["bias"]
    qkv = x @ block["attn"]["qkv"]["kernel"] + block["attn"]["qkv"]["bias"]
    q, k, _ = np.moveaxis(qkv.reshape(2, 5, 3, 2, 4), 2, 0)  # (2, 5, heads, 4) each
    scores = np.einsum("bhd,bnhd->bhn", q[:, 0], k) / 2
    expected = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)  # of the class token
    np.testing.assert_allclose(first, 5 * expected.mean(1)[:, 1:].reshape(2, 2, 2), rtol=1e-5)


def test_a_model_that_does_not_attend_has_no_maps():
    model = sret_jax.create_model("mixer_s16")
    with pytest.raises(ValueError, match="a Mixer has no attention maps: its blocks mix tokens"):
        attention_maps(model, {}, images(16))
