"""Sliced group self-attention (SReT section 3.4) and the permutations that mix its groups."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sret_jax.models.kernels.choice import Kernels
from sret_jax.models.kernels.fused_attention import can_hold, fused_attention
from sret_jax.models.layers import linear

PermutationFn = Callable[[jax.Array, int], jax.Array | np.ndarray]


def random_permutation(key: jax.Array, tokens: int) -> jax.Array:
    """A uniformly random permutation of range(tokens)."""
    return jax.random.permutation(key, tokens)


def fixed_permutation(key: jax.Array, tokens: int) -> np.ndarray:
    """A permutation that depends on the token count alone, whatever the library versions."""
    del key
    # NumPy promises never to change RandomState's stream; a Generator's stream may change.
    return np.random.RandomState(tokens).permutation(tokens)


def identity_permutation(key: jax.Array, tokens: int) -> np.ndarray:
    """The identity: tokens stay in raster order."""
    del key
    return np.arange(tokens)


PERMUTATIONS: dict[str, PermutationFn] = {
    "random": random_permutation,
    "fixed": fixed_permutation,
    "identity": identity_permutation,
}


class SlicedAttention(nn.Module):
    """Multi-head self-attention inside each of `groups` equal slices of the tokens.

    A slice G of the (permuted) sequence gives, for each head of width d = C / heads,
    out_G = softmax(Q_G K_G^T / sqrt(d)) V_G. With one slice this is plain attention. The softmax
    is computed in at least float32.

    Shapes: (B, N, C) -> (B, N, C). `permutation` is (N,): slot i holds token permutation[i].
    """

    heads: int
    kernels: Kernels = Kernels()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, *, groups: int = 1, permutation: jax.Array | None = None
    ) -> jax.Array:
        channels = x.shape[-1]
        same: dict[str, Any] = dict(dtype=self.dtype, mesh=self.kernels.mesh)
        qkv = linear(3 * channels, channels, **same, name="qkv")(x)  # (B, N, 3C)
        out = self._attend(qkv, permutation, groups)  # (B, N, C)
        return linear(channels, channels, **same, name="proj")(out)

    def _attend(self, qkv: jax.Array, permutation: jax.Array | None, groups: int) -> jax.Array:
        plain = permuted(partial(plain_attention, heads=self.heads, groups=groups))
        if self.is_initializing():
            return plain(qkv, permutation)

        def kernel(qkv: jax.Array, permutation: jax.Array | None, interpret: bool) -> jax.Array:
            static: dict[str, Any] = dict(heads=self.heads, groups=groups)
            fused = partial(fused_attention, **static, interpret=interpret)
            if can_hold(qkv, **static, permuted=permutation is not None):
                return fused(qkv, permutation)
            if can_hold(qkv, **static, permuted=False):
                return permuted(partial(fused, permutation=None))(qkv, permutation)
            return plain(qkv, permutation)

        attend = self.kernels.choose(self.kernels.attention, kernel, plain, images=1)
        return attend(qkv, permutation)


def permuted(
    attend: Callable[[jax.Array], jax.Array],
) -> Callable[[jax.Array, jax.Array | None], jax.Array]:
    """Runs `attend` on permuted tokens and returns its output in the original order."""

    def run(qkv: jax.Array, permutation: jax.Array | None) -> jax.Array:
        if permutation is None:
            return attend(qkv)
        out = attend(_take_tokens(qkv, permutation))
        return _take_tokens(out, jnp.argsort(permutation))

    return run


def plain_attention(qkv: jax.Array, heads: int, groups: int) -> jax.Array:
    """softmax(Q_G K_G^T / sqrt(d)) V_G for each of `groups` equal slices G of the tokens and head.

    The axis of heads precedes the axis of tokens, which makes the operands of every matrix product
    contiguous; CPUs need that. The softmax is computed in at least float32.

    Shapes: (B, N, 3C) -> (B, N, C). The last axis holds Q, then K, then V, each head by head.
    """
    batch, tokens, channels = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    head_dim = channels // heads
    qkv = qkv.reshape(batch, groups, tokens // groups, 3, heads, head_dim)
    q, k, v = jnp.moveaxis(qkv, (3, 4), (0, 3))  # (B, G, heads, N/G, d): contiguous matrices

    q *= head_dim**-0.5
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bghnd,bghmd->bghnm", q, k, preferred_element_type=wide)
    # Dividing after the product with V is cheaper: there are fewer outputs than scores.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    out = jnp.einsum("bghnm,bghmd->bghnd", weights.astype(v.dtype), v)
    out = (out / weights.sum(-1, keepdims=True)).astype(v.dtype)  # (B, G, heads, N/G, d)
    return out.swapaxes(2, 3).reshape(batch, tokens, channels)


def _take_tokens(x: jax.Array, order: jax.Array) -> jax.Array:
    """x[:, order]; its gradient relies on `order` being a permutation."""
    return x.at[:, order].get(unique_indices=True, mode="promise_in_bounds")
