"""Inspected groups and coefficients are those that the model computes with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sret_jax
from sret_jax.models.layers.attention import SlicedAttention, fixed_permutation


@pytest.fixture(scope="module")
def model():
    return sret_jax.create_model("sret_t", image_size=64, loops=3, groups=((4, 2), (4, 1), (1, 1)))


@pytest.mark.parametrize(("loop", "groups", "permutes"), [(0, 4, False), (1, 2, True)])
def test_tokens_of_one_group_and_no_others_reach_each_other(model, loop, groups, permutes):
    found = sret_jax.attention_groups(model, stage=0, loop=loop)
    assert found.shape == (8, 8)
    attention = SlicedAttention(heads=2)
    permutation = fixed_permutation(None, 64) if permutes else None
    x = jax.random.normal(jax.random.key(0), (1, 64, 8))
    variables = attention.init(jax.random.key(1), x)

    def reached(i):
        def token(x):
            y = attention.apply(variables, x, groups=groups, permutation=permutation)
            return y[0, i].sum()

        return jnp.abs(jax.grad(token)(x)[0]).sum(axis=-1) > 0

    np.testing.assert_array_equal(
        jax.jit(jax.vmap(reached))(jnp.arange(64)), found.ravel()[:, None] == found.ravel()
    )


def test_loops_run_on_through_the_cycle_and_a_key_draws_another_permutation(model):
    first, second, third = (sret_jax.attention_groups(model, 0, loop) for loop in range(3))
    np.testing.assert_array_equal(first, third)
    drawn = sret_jax.attention_groups(model, 0, 1, jax.random.key(3))
    assert not np.array_equal(drawn, second)
    np.testing.assert_array_equal(np.bincount(drawn.ravel()), [32, 32])
    assert not sret_jax.attention_groups(model, stage=2, loop=1).any()
    with pytest.raises(IndexError, match=r"loop=3 is none of 0 .. 2"):
        sret_jax.attention_groups(model, 0, 3)


def test_the_groups_of_a_swin_are_its_windows():
    model = sret_jax.create_model("swin_tiny", image_size=64, window=4, loops=2)
    windows = sret_jax.attention_groups(model, stage=0, loop=0)
    assert windows.shape == (16, 16) and windows.max() == 15
    np.testing.assert_array_equal(windows[:4, 4:8], np.full((4, 4), 1))
    shifted = sret_jax.attention_groups(model, stage=0, loop=1)
    assert shifted[2, 2] == shifted[5, 5] != shifted[1, 1]
    assert shifted[0, 0] != shifted[15, 15]  # the same window, but opposite borders of the image
    np.testing.assert_array_equal(shifted, sret_jax.attention_groups(model, 0, 0, block=1))


def test_coefficients_are_listed_by_application(model):
    model = model.clone(nll_every=2)
    block = {
        "block": {
            "attn_residual": {"skip": 1.0, "branch": 2.0},
            "mlp_residual": {"skip": 3.0, "branch": 4.0},
        },
        "nll": {"residual": {"skip": np.array([5.0]), "branch": np.array([6.0])}},
    }
    names = [f"stage{s}_block{b}" for s, n in enumerate(model.blocks) for b in range(n)]
    found = sret_jax.residual_coefficients(model, {"params": dict.fromkeys(names, block)})
    assert found["attention, branch"] == [2.0] * 30
    assert found["NLL, skip"] == [None, 5.0, None] * 10
