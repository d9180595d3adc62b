import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sret_jax

SETTINGS = dict(
    num_classes=10, image_size=16, blocks=(2,), groups=((2, 1),), heads=(2,), dim=8, loops=2
)


@functools.cache
def trained(**changes):
    model = sret_jax.create_model("sret_t", **{**SETTINGS, **changes})
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))


@pytest.mark.parametrize(
    ("loops", "nlls"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 1]), (4, [0, 1, 1, 1])]
)
def test_fewer_loops_keep_the_first_nlls_and_more_repeat_the_last(loops, nlls):
    model, variables = trained()
    new, changed = sret_jax.with_loops(model, variables, loops)
    assert new == sret_jax.create_model("sret_t", **{**SETTINGS, "loops": loops})
    before, after = (v["params"]["stage0_block1"] for v in (variables, changed))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a[np.array(nlls)], b),
        *(part["nll"] for part in (before, after)),
    )
    jax.tree.map(np.testing.assert_array_equal, before["block"], after["block"])
    assert jax.eval_shape(new.apply, changed, jnp.zeros((2, 16, 16, 3))).shape == (2, 10)


def test_loops_that_end_between_nlls_count_only_those_they_reach():
    model, variables = trained(loops=4, nll_every=2)
    _, changed = sret_jax.with_loops(model, variables, 7)
    assert changed["params"]["stage0_block0"]["nll"]["residual"]["skip"].shape == (3,)


def test_loops_that_a_model_cannot_have_are_refused():
    model, variables = trained(nll_every=2)
    with pytest.raises(ValueError, match="loops=0 must be a whole number of at least 1"):
        sret_jax.with_loops(model, variables, 0)
    with pytest.raises(ValueError, match="nll_every=2 is more than loops=1"):
        sret_jax.with_loops(model, variables, 1)
