"""Windows: which tokens attend to each other, and bias tables of other sizes."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sret_jax.models.layers.windows import WindowAttention, Windows, resize_bias_table, window_cycle
from tests.timm_models import import_timm, needs_timm


@pytest.mark.parametrize(
    "windows", [Windows(8, 4), Windows(8, 4, 2), Windows(7, 3, 1), Windows(2, 2)], ids=str
)
def test_tokens_of_one_group_and_no_others_reach_each_other(windows):
    tokens = windows.side**2
    attention = WindowAttention(heads=2)
    x = jax.random.normal(jax.random.key(0), (1, tokens, 4))
    variables = attention.init(jax.random.key(1), x, windows)

    def reached(i):
        def token(x):
            return attention.apply(variables, x, windows)[0, i].sum()

        return jnp.abs(jax.grad(token)(x)[0]).sum(axis=-1) > 1e-20  # a mask leaves e^-100

    group = windows.groups().ravel()
    assert set(group) == set(range(group.max() + 1))
    np.testing.assert_array_equal(
        jax.jit(jax.vmap(reached))(jnp.arange(tokens)), group[:, None] == group
    )


def test_joining_is_the_inverse_of_cutting():
    for windows in (Windows(8, 4, 2), Windows(7, 3, 1), Windows(5, 5)):
        x = np.arange(2.0 * windows.side**2 * 3).reshape(2, -1, 3)
        np.testing.assert_array_equal(windows.join(windows.cut(x)), x)


def test_shifts_alternate_from_block_to_block_and_from_loop_to_loop():
    plain, shifted = Windows(14, 7, 0), Windows(14, 7, 3)
    assert window_cycle(14, 7, block=0) == (plain, shifted)
    assert window_cycle(14, 7, block=3) == (shifted, plain)
    assert window_cycle(7, 7, block=1) == (Windows(7, 7),)
    assert window_cycle(4, 7, block=1) == (Windows(4, 4),)


@needs_timm
@pytest.mark.parametrize(("old", "new"), [(7, 12), (12, 7), (7, 8), (2, 7), (7, 7), (1, 3)])
def test_a_resized_bias_table_is_that_of_timm(old, new):
    import_timm()
    torch, layers = (importlib.import_module(name) for name in ("torch", "timm.layers"))
    table = np.random.default_rng(0).standard_normal(((2 * old - 1) ** 2, 3)).astype(np.float32)
    shape = ((2 * new - 1) ** 2, 3)
    expected = layers.resize_rel_pos_bias_table(torch.from_numpy(table), (new, new), shape)
    found = resize_bias_table(jnp.asarray(table), new)
    assert found.shape == shape
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-4)
