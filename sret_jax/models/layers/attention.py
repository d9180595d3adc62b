"""Sliced group self-attention (SReT section 3.4) and the permutations that mix its slices."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sret_jax.models.kernels.fused_attention import can_hold, fused_attention
from sret_jax.models.layers.linear import LayerSettings

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


class Slices(NamedTuple):
    """How one application of a block slices its tokens.

    Attributes:
      groups: number of equal slices; 1 is plain attention.
      permuted: whether tokens are permuted before they are sliced.
    """

    groups: int = 1
    permuted: bool = False


PLAIN = Slices()


def slice_cycle(groups: tuple[int, ...]) -> tuple[Slices, ...]:
    """The slices of successive applications: all but the first of a cycle permute the tokens."""
    return tuple(Slices(g, permuted=i > 0 and g > 1) for i, g in enumerate(groups))


class SlicedAttention(nn.Module):
    """Multi-head self-attention inside each of `groups` equal slices of the tokens.

    A slice G of the (permuted) sequence gives, for each head of width d = C / heads,
    out_G = softmax(Q_G K_G^T / sqrt(d)) V_G. With one slice this is plain attention. The softmax
    is computed in at least float32.

    The first `prefix` tokens, such as a class token, belong to no slice: they attend to all tokens,
    and the tokens of every slice attend to them as well. (Ours; SReT has no such tokens.)

    Shapes: (B, prefix + N, C) -> (B, prefix + N, C). `permutation` is (N,): slot i holds token
    permutation[i].
    """

    heads: int
    layers: LayerSettings = LayerSettings()
    prefix: int = 0

    @nn.compact
    def __call__(
        self, x: jax.Array, *, groups: int = 1, permutation: jax.Array | None = None
    ) -> jax.Array:
        channels = x.shape[-1]
        qkv = self.layers.linear(3 * channels, channels, name="qkv")(x)  # (B, N, 3C)
        if self.prefix and groups > 1:
            out = self._attend_with_prefix(qkv, permutation, groups)
        else:
            out = self._attend(qkv, permutation, groups)  # (B, N, C)
        return self.layers.linear(channels, channels, name="proj")(out)

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

        kernels = self.layers.kernels
        return kernels.choose(kernels.attention, kernel, plain, images=1)(qkv, permutation)

    def _attend_with_prefix(
        self, qkv: jax.Array, permutation: jax.Array | None, groups: int
    ) -> jax.Array:
        attend = partial(prefix_attention, heads=self.heads, groups=groups)
        prefix, tokens = qkv[:, : self.prefix], qkv[:, self.prefix :]
        if permutation is None:
            return jnp.concatenate(attend(prefix, tokens), axis=1)
        prefix, tokens = attend(prefix, _take_tokens(tokens, permutation))
        return jnp.concatenate([prefix, _take_tokens(tokens, jnp.argsort(permutation))], axis=1)


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

    Shapes: (B, N, 3C) -> (B, N, C). The last axis holds Q, then K, then V, each head by head.
    """
    return joined(attention(*split(qkv, heads, groups)))


def prefix_attention(
    prefix: jax.Array, tokens: jax.Array, heads: int, groups: int
) -> tuple[jax.Array, jax.Array]:
    """Attention inside slices of `tokens`; the `prefix` is a part of every slice.

    The queries of the prefix see all tokens, those of a slice G see the prefix and G.

    Shapes: Q, K, V of prefix (B, p, 3C) and tokens (B, N, 3C) -> (B, p, C), (B, N, C).
    """
    everything = jnp.concatenate([prefix, tokens], axis=1)
    _, k, v = split(everything, heads, 1)
    pq, pk, pv = split(prefix, heads, 1)  # (B, 1, heads, p, d)
    out = joined(attention(pq, k, v))  # (B, p, C)

    q, k, v = split(tokens, heads, groups)
    pk, pv = (jnp.broadcast_to(x, (*k.shape[:3], *x.shape[3:])) for x in (pk, pv))
    k, v = jnp.concatenate([pk, k], axis=3), jnp.concatenate([pv, v], axis=3)
    return out, joined(attention(q, k, v))


def attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """softmax(Q K^T / sqrt(d) + bias) V; the softmax is computed in at least float32.

    Shapes: (B, G, heads, n, d), twice (B, G, heads, m, d) -> (B, G, heads, n, d). The bias
    broadcasts to (B, G, heads, n, m).
    """
    q *= q.shape[-1] ** -0.5
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bghnd,bghmd->bghnm", q, k, preferred_element_type=wide)
    if bias is not None:
        scores += bias
    # Dividing after the product with V is cheaper: there are fewer outputs than scores.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    out = jnp.einsum("bghnm,bghmd->bghnd", weights.astype(v.dtype), v)
    return (out / weights.sum(-1, keepdims=True)).astype(v.dtype)


def split(qkv: jax.Array, heads: int, groups: int) -> jax.Array:
    """Splits Q, K, V into slices and heads: (B, N, 3C) -> (3, B, G, heads, N/G, d).

    The axis of heads precedes the axis of tokens, which makes the operands of every matrix product
    contiguous; CPUs need that.
    """
    batch, tokens, channels = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    qkv = qkv.reshape(batch, groups, tokens // groups, 3, heads, channels // heads)
    return jnp.moveaxis(qkv, (3, 4), (0, 3))


def joined(out: jax.Array) -> jax.Array:
    """Joins slices and heads: (B, G, heads, n, d) -> (B, G * n, heads * d)."""
    batch, groups, heads, tokens, dim = out.shape
    return out.swapaxes(2, 3).reshape(batch, groups * tokens, heads * dim)


def _take_tokens(x: jax.Array, order: jax.Array) -> jax.Array:
    """x[:, order]; its gradient relies on `order` being a permutation."""
    return x.at[:, order].get(unique_indices=True, mode="promise_in_bounds")
