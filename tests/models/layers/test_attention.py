"""Attention inside slices, and the tokens that belong to no slice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sret_jax.models.layers.attention import SlicedAttention
from sret_jax.models.layers.linear import LayerSettings

TOKENS, CHANNELS, HEADS = 12, 8, 2


def masked(params, x, mask):
    """softmax(Q K^T / sqrt(d) where mask, else -inf) V, projected; mask is (n, n)."""
    qkv = x @ params["qkv"]["kernel"] + params["qkv"]["bias"].reshape(1, 1, -1)
    q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, HEADS, -1), 2, 0)  # (B, n, heads, d)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask[None, None], scores, -jnp.inf))
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    return out.reshape(x.shape) @ params["proj"]["kernel"] + params["proj"]["bias"].reshape(
        1, 1, -1
    )


@pytest.mark.parametrize("prefix", [1, 2])
def test_prefix_tokens_and_all_slices_attend_to_each_other(prefix):
    groups, rng = 3, np.random.default_rng(0)
    permutation = rng.permutation(TOKENS)
    slice_of = np.empty(TOKENS, int)  # of a token
    slice_of[permutation] = np.arange(TOKENS) // (TOKENS // groups)
    mask = np.ones((prefix + TOKENS, prefix + TOKENS), bool)
    mask[prefix:, prefix:] = slice_of[:, None] == slice_of

    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((2, prefix + TOKENS, CHANNELS)))
        attention = SlicedAttention(HEADS, LayerSettings(dtype=np.float64), prefix)
        shapes = jax.eval_shape(attention.init, jax.random.key(0), x)
        variables = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape)), shapes)

        def ours(variables, x):
            out = attention.apply(variables, x, groups=groups, permutation=permutation)
            return (out**2).sum(), out

        def plain(variables, x):
            out = masked(variables["params"], x, jnp.asarray(mask))
            return (out**2).sum(), out

        found, expected = (
            jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(variables, x) for f in (ours, plain)
        )
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert a.dtype == np.float64
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * np.abs(b).max())
