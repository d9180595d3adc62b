"""A residual MLP as one TPU kernel: main memory holds its input, hidden layer and output only.

    y = a*x + b*k*(GELU(h) W2 + b2),  h = u W1 + b1,  u = LN(x),

with residual coefficients a and b, and each image's drop-path factor k. Backward, with dy,
g = k*dy and s = g W2^T:

    dh = b*s * GELU'(h),  dx = a*dy + LN'(dh W1^T),  dW1 = u^T dh,  dW2 = b * GELU(h)^T g,
    da = <dy, x>,  db = k*q,  dk = b*q per image,  q = <dy W2^T, GELU(h)> + <dy, b2>.

One grid step processes a block of one image's tokens; the weights and their gradients stay in fast
memory throughout. (SReT section 3.2: the MLP of the shared block, and the non-linear layer.)
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sret_jax.models.kernels.choice import CORES, FAST_MEMORY, ROWS, cost, dot, knows, tiled_bytes

MOST_BYTES = FAST_MEMORY * 15 // 16  # limit for what `_needed` counts
LEAST_TOKENS = 64  # per block that is not a whole image: every block adds to the weight gradients

Shape = jax.Array | jax.ShapeDtypeStruct
Residuals = tuple[jax.Array, jax.Array, "Weights", jax.Array]

_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"))


class Weights(NamedTuple):
    """The parameters of a residual MLP in float32; vectors are rows.

    Shapes: coefficients (1, 2), which are a and b; scale and shift of LN (1, C); w1 (C, hidden);
    b1 (1, hidden); w2 (hidden, C); b2 (1, C).
    """

    coefficients: Any
    scale: Any
    shift: Any
    w1: Any
    b1: Any
    w2: Any
    b2: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def fused_mlp(
    x: jax.Array, keep: jax.Array, weights: Weights, epsilon: float, interpret: bool
) -> jax.Array:
    """Computes the residual MLP.

    Args:
      x: (B, N, C), small enough for `can_hold`. Matrix products have its dtype; all else is
        float32.
      keep: (B,), k of each image.
      weights: the parameters of the MLP.
      epsilon: added to LN's variance.
      interpret: runs the kernel step by step on any device.

    Returns:
      (B, N, C) in x's dtype.
    """
    return _forward(x, keep, weights, epsilon, interpret)[0]


def can_hold(x: Shape, hidden: int) -> bool:
    """Whether an MLP with `hidden` units and a block of x's tokens (B, N, C) fit in fast memory."""
    return knows(x.dtype) and _block(x, hidden) > 0


@functools.partial(jax.jit, static_argnums=(3, 4))
def _forward(
    x: jax.Array, keep: jax.Array, weights: Weights, epsilon: float, interpret: bool
) -> tuple[jax.Array, Residuals]:
    h = jax.ShapeDtypeStruct((*x.shape[:2], weights.w1.shape[1]), x.dtype)
    operands = (x, keep.reshape(-1, 1, 1), *_for_products(weights, x))
    block = _block(x, h.shape[2])
    y, h = pl.pallas_call(
        functools.partial(_forward_kernel, epsilon),
        grid=_grid(x, block),
        in_specs=[_tokens(x, block), _factor(x), *map(_whole, weights)],
        out_specs=[_tokens(x, block), _tokens(h, block)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), h],
        cost_estimate=cost(2 * x.size * h.shape[2], h.size, [*operands, x, h]),
        compiler_params=_PARAMS,
        interpret=interpret,
    )(*operands)
    return y, (x, keep, weights, h)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(
    epsilon: float, interpret: bool, residuals: Residuals, dy: jax.Array
) -> tuple[jax.Array, jax.Array, Weights]:
    x, keep, weights, h = residuals
    operands = (x, keep.reshape(-1, 1, 1), *_for_products(weights, x), h, dy)
    sums = [jax.ShapeDtypeStruct((_cores(x), *w.shape), jnp.float32) for w in weights]
    block = _block(x, h.shape[2])
    d_keep = jax.ShapeDtypeStruct((x.shape[0], 1, 1), jnp.float32)
    dx, d_keep, *d_weights = pl.pallas_call(
        functools.partial(_backward_kernel, epsilon, x.shape[1]),
        grid=_grid(x, block),
        in_specs=[
            *(_tokens(x, block), _factor(x), *map(_whole, weights)),
            *(_tokens(h, block), _tokens(dy, block)),
        ],
        out_specs=[_tokens(x, block), _factor(x), *map(_sum, sums)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), d_keep, *sums],
        cost_estimate=cost(4 * x.size * h.shape[2], 2 * h.size, [*operands, x, d_keep, *sums]),
        compiler_params=_PARAMS,
        interpret=interpret,
    )(*operands)
    d_keep = d_keep.ravel().astype(keep.dtype)  # (B,)
    return dx, d_keep, Weights(*(d.sum(0) for d in d_weights))


fused_mlp.defvjp(_forward, _backward)


def _for_products(weights: Weights, x: jax.Array) -> Weights:
    return weights._replace(w1=weights.w1.astype(x.dtype), w2=weights.w2.astype(x.dtype))


def _grid(x: Shape, block: int) -> tuple[int, int, int]:
    """(cores, images per core, blocks of tokens per image)."""
    return _cores(x), x.shape[0] // _cores(x), pl.cdiv(x.shape[1], block)


def _cores(x: Shape) -> int:
    return math.gcd(CORES, x.shape[0])


def _block(x: Shape, hidden: int) -> int:
    """Tokens per block: all of an image, or the fewest equal blocks of whole tiles; 0 if none fit.

    The last block may end behind the last token.
    """
    tokens = x.shape[1]
    parts = (pl.cdiv(tokens, n * ROWS) * ROWS for n in range(2, tokens // LEAST_TOKENS + 1))
    fitting = (n for n in (tokens, *parts) if _needed(x, hidden, n) <= MOST_BYTES)
    return next(fitting, 0)


def _needed(x: Shape, hidden: int, block: int) -> int:
    """About how many bytes of fast memory the backward pass needs.

    W1, W2 and their gradients in float32 are held once. A block's x, dy, dx and h are held twice,
    to load the next block in time. There are about four more float32 arrays of either width.
    """
    channels, wide = x.shape[2], jnp.float32
    matrices, rows = ((channels, hidden), (hidden, channels)), ((block, channels), (block, hidden))
    held = sum(tiled_bytes(m, x.dtype) + tiled_bytes(m, wide) for m in matrices)
    operands = 3 * tiled_bytes(rows[0], x.dtype) + tiled_bytes(rows[1], x.dtype)
    made = sum(tiled_bytes(r, wide) for r in rows)
    return held + 2 * operands + 4 * made


def _tokens(x: Shape, block: int) -> pl.BlockSpec:
    images = x.shape[0] // _cores(x)
    shape = (None, block, x.shape[2])
    return pl.BlockSpec(shape, lambda core, image, part: (core * images + image, part, 0))


def _factor(x: Shape) -> pl.BlockSpec:
    images = x.shape[0] // _cores(x)
    return pl.BlockSpec((None, 1, 1), lambda core, image, part: (core * images + image, 0, 0))


def _whole(weight: Shape) -> pl.BlockSpec:
    once = pl.Buffered(1)
    return pl.BlockSpec(weight.shape, lambda core, image, part: (0, 0), pipeline_mode=once)


def _sum(sums: Shape) -> pl.BlockSpec:
    block, once = (None, *sums.shape[1:]), pl.Buffered(1)
    return pl.BlockSpec(block, lambda core, image, part: (core, 0, 0), pipeline_mode=once)


def _forward_kernel(
    epsilon: float,
    x_ref: Any, k_ref: Any, ab: Any, scale: Any, shift: Any, w1: Any, b1: Any, w2: Any, b2: Any,
    y_ref: Any, h_ref: Any,
) -> None:  # fmt: skip
    x = x_ref[...]  # (n, C)
    normal, _ = _normalise(x, epsilon)
    u = (normal * scale[...] + shift[...]).astype(x.dtype)
    h = (dot(u, w1[...]) + b1[...]).astype(x.dtype)  # (n, hidden)
    active, _ = _gelu(h)
    out = dot(active.astype(x.dtype), w2[...]) + b2[...]  # (n, C)
    y = ab[0, 0] * x.astype(jnp.float32) + ab[0, 1] * k_ref[0, 0] * out
    h_ref[...] = h
    y_ref[...] = y.astype(y_ref.dtype)


def _backward_kernel(
    epsilon: float, tokens: int,
    x_ref: Any, k_ref: Any, ab: Any, scale: Any, shift: Any, w1: Any, b1: Any, w2: Any, b2: Any,
    h_ref: Any, dy_ref: Any, dx_ref: Any, dk_ref: Any, *sums: Any,
) -> None:  # fmt: skip
    d_weights = _zero_at_first(Weights(*sums), dk_ref)
    x, dy = _rows(x_ref, tokens), _rows(dy_ref, tokens).astype(jnp.float32)  # (n, C)
    a, b, k = ab[0, 0], ab[0, 1], k_ref[0, 0]
    normal, inverse_deviation = _normalise(x, epsilon)
    u = normal * scale[...] + shift[...]
    active, slope = _gelu(_rows(h_ref, tokens))  # (n, hidden)

    g = k * dy
    d_active = dot(dy.astype(x.dtype), w2[...].T)  # (n, hidden), without the factors k and b
    dh = b * k * d_active * slope
    du = dot(dh.astype(x.dtype), w1[...].T)  # (n, C)
    d_normal = du * scale[...]
    mean = jnp.mean(d_normal, axis=1, keepdims=True)
    along = jnp.mean(d_normal * normal, axis=1, keepdims=True)
    dx = a * dy + inverse_deviation * (d_normal - mean - along * normal)
    dx_ref[...] = dx.astype(dx_ref.dtype)

    da, q = jnp.sum(dy * x.astype(jnp.float32)), jnp.sum(d_active * active) + jnp.sum(dy * b2[...])
    dk_ref[...] += jnp.full(dk_ref.shape, b * q)
    is_first = jax.lax.broadcasted_iota(jnp.int32, ab.shape, 1) == 0
    d_weights.coefficients[...] += jnp.where(is_first, da, k * q)
    d_weights.scale[...] += _over_tokens(du * normal)
    d_weights.shift[...] += _over_tokens(du)
    d_weights.w1[...] += dot(u.astype(x.dtype).T, dh.astype(x.dtype))
    d_weights.b1[...] += _over_tokens(dh)
    d_weights.w2[...] += dot(active.astype(x.dtype).T, (b * g).astype(x.dtype))
    d_weights.b2[...] += b * _over_tokens(g)


def _rows(ref: Any, tokens: int) -> jax.Array:
    """The rows of a block; those behind the last token, which are undefined, become 0."""
    x: jax.Array = ref[...]
    if tokens % x.shape[0] == 0:
        return x
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) + pl.program_id(2) * x.shape[0]
    return jnp.where(row < tokens, x.astype(jnp.float32), 0).astype(x.dtype)


def _zero_at_first(sums: Weights, dk_ref: Any) -> Weights:
    """Zeroes the sums over a core's steps at its first step, and dk at each image's first."""
    first_part = pl.program_id(2) == 0

    @pl.when((pl.program_id(1) == 0) & first_part)
    def _() -> None:
        for total in sums:
            total[...] = jnp.zeros_like(total)

    @pl.when(first_part)
    def _() -> None:
        dk_ref[...] = jnp.zeros_like(dk_ref)

    return sums


def _normalise(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """(x - mean) / deviation of each row, and 1 / deviation, in float32."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=1, keepdims=True)
    inverse_deviation = jax.lax.rsqrt(variance + epsilon)
    return centred * inverse_deviation, inverse_deviation


def _gelu(h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """GELU(h) = h Phi(h), and its slope Phi(h) + h phi(h), in float32."""
    h = h.astype(jnp.float32)
    cdf = 0.5 * (1 + jax.lax.erf(h * math.sqrt(0.5)))
    return h * cdf, cdf + h * jnp.exp(-0.5 * h * h) / math.sqrt(2 * math.pi)


def _over_tokens(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=0, keepdims=True)  # (1, C)
