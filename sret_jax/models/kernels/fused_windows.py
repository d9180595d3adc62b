"""Attention in windows as one TPU kernel: scores and softmax never leave the chip's fast memory.

For every window and every head of width d (Swin, equation 4, with the mask of shifted windows):

    P = softmax(Q K^T / sqrt(d) + bias + mask),  O = P V.

The backward pass recomputes P from Q, K, bias and mask instead of storing it:

    dV = P^T dO,  dP = dO V^T,  dS = P * (dP - rowsum(P * dP)),  dbias = sum of dS,
    dQ = dS K / sqrt(d),  dK = dS^T Q / sqrt(d),

where the sum is over images and windows; it stays in fast memory throughout.

One grid step processes one image with all its windows and heads. The scores of 49 tokens would fill
49 of a tile's 128 columns, so windows that fit into a tile together are one matrix of scores, where
a mask of -inf separates them: the softmax costs as much for two windows of 7x7 as for one.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sret_jax.models.kernels.choice import (
    CORES,
    FAST_MEMORY,
    LANES,
    TILE_ROWS,
    cost,
    dot,
    knows,
    tiled_bytes,
)

MOST_BYTES = FAST_MEMORY * 15 // 16  # limit for what `can_hold` counts

Shape = jax.Array | jax.ShapeDtypeStruct
Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"))


def fused_windows(qkv: jax.Array, bias: jax.Array, mask: np.ndarray, interpret: bool) -> jax.Array:
    """Attention inside windows with a bias of each head and a mask of each window.

    Args:
      qkv: (B, windows * n, 3 * heads * d), window by window, small enough for `can_hold`: queries,
        keys and values, each with its heads side by side.
      bias: (heads, n, n), added to the scores of every window.
      mask: (windows, n, n), added to the scores of every head.
      interpret: runs the kernel step by step on any device.

    Returns:
      (B, windows * n, heads * d) in qkv's dtype. Scores and softmax are float32.
    """
    masks, of_group = _group(mask)
    together = masks.shape[1] // mask.shape[1]
    bias = jnp.tile(bias.astype(jnp.float32), (1, together, together))
    return _attend(qkv, bias, masks, of_group, interpret)


def can_hold(qkv: Shape, heads: int, mask: np.ndarray) -> bool:
    """Whether the kernel's data fit in fast memory.

    The backward pass needs the most. It holds QKV, dO and dQKV twice, to load the next image in
    time, and once the masks, the bias and its gradient. For one head it holds, in float32, four
    arrays of scores and four of (n, d).
    """
    _, tokens, channels = qkv.shape
    masks, _ = _group(mask)
    n, wide = masks.shape[1], jnp.float32
    image = 2 * tiled_bytes((tokens, channels), qkv.dtype)
    image += tiled_bytes((tokens, channels // 3), qkv.dtype)
    once = tiled_bytes(masks.shape, wide) + 2 * tiled_bytes((heads, n, n), wide)
    made = 4 * (tiled_bytes((n, n), wide) + tiled_bytes((n, channels // (3 * heads)), wide))
    return knows(qkv.dtype) and 2 * image + once + made <= MOST_BYTES


def _group(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups successive windows that share one matrix of scores; its columns fill a tile at most.

    Args:
      mask: (windows, n, n).

    Returns:
      The distinct masks of groups, (masks, m, m), and the mask of each group, (1, groups).
    """
    windows, n, _ = mask.shape
    size = max(t for t in range(1, windows + 1) if windows % t == 0 and (t == 1 or t * n <= LANES))
    apart = np.full((windows // size, size, n, size, n), -np.inf, np.float32)
    for i in range(size):
        apart[:, i, :, i] = mask[i::size]
    masks, of_group = np.unique(apart.reshape(-1, size * n, size * n), axis=0, return_inverse=True)
    return masks, of_group.reshape(1, -1).astype(np.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    qkv: jax.Array, bias: jax.Array, masks: jax.Array, of_group: jax.Array, interpret: bool
) -> jax.Array:
    """Attention inside groups of m tokens.

    Shapes: (B, groups * m, 3 * heads * d), (heads, m, m), (masks, m, m), (1, groups) ->
    (B, groups * m, heads * d).
    """
    return _forward(qkv, bias, masks, of_group, interpret)[0]


@functools.partial(jax.jit, static_argnums=4)
def _forward(
    qkv: jax.Array, bias: jax.Array, masks: jax.Array, of_group: jax.Array, interpret: bool
) -> tuple[jax.Array, Residuals]:
    batch, tokens, channels = qkv.shape
    out = jax.ShapeDtypeStruct((batch, tokens, channels // 3), qkv.dtype)
    operands = (of_group, bias, masks, qkv)
    (y,) = _kernel_call(_forward_kernel, operands, (out,), 2, interpret)(*operands)
    return y, (qkv, bias, masks, of_group)


@functools.partial(jax.jit, static_argnums=0)
def _backward(
    interpret: bool, residuals: Residuals, d_out: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    qkv, bias, masks, of_group = residuals
    sums = jax.ShapeDtypeStruct((_cores(qkv), *bias.shape), jnp.float32)
    operands = (of_group, bias, masks, qkv, d_out)
    call = _kernel_call(_backward_kernel, operands, (qkv, sums), 5, interpret)
    d_qkv, d_bias = call(*operands)
    return d_qkv, d_bias.sum(0), None, None


_attend.defvjp(_forward, _backward)


def _kernel_call(
    kernel: Callable,
    operands: tuple[Shape, ...],
    results: tuple[Shape, ...],
    matmuls: int,
    interpret: bool,
) -> Callable[..., Any]:
    """Runs `kernel`, which computes `matmuls` products of (m, m) with d per group and head."""
    of_group, bias, masks, *images = operands
    batch, tokens, channels = images[0].shape
    heads, m, _ = bias.shape
    scores = batch * heads * tokens * m
    return pl.pallas_call(
        functools.partial(kernel, heads=heads, tokens=m),
        grid=(_cores(images[0]), batch // _cores(images[0])),
        in_specs=[
            pl.BlockSpec(of_group.shape, lambda core, image: (0, 0), memory_space=pltpu.SMEM),
            *map(_whole, (bias, masks)),
            *map(_image, images),
        ],
        out_specs=[_image(results[0]), *map(_sum, results[1:])],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        cost_estimate=cost(
            matmuls * scores * channels // (3 * heads), scores, (*operands, *results)
        ),
        compiler_params=_PARAMS,
        interpret=interpret,
    )


def _cores(x: Shape) -> int:
    return math.gcd(CORES, x.shape[0])


def _image(x: Shape) -> pl.BlockSpec:
    images = x.shape[0] // _cores(x)
    return pl.BlockSpec((None, *x.shape[1:]), lambda core, image: (core * images + image, 0, 0))


def _whole(x: Shape) -> pl.BlockSpec:
    once = pl.Buffered(1)
    return pl.BlockSpec(x.shape, lambda core, image: (0, 0, 0), pipeline_mode=once)


def _sum(sums: Shape) -> pl.BlockSpec:
    block, once = (None, *sums.shape[1:]), pl.Buffered(1)
    return pl.BlockSpec(block, lambda core, image: (core, 0, 0, 0), pipeline_mode=once)


def _forward_kernel(
    of_group: Any, bias_ref: Any, mask_ref: Any, qkv_ref: Any, out_ref: Any,
    *, heads: int, tokens: int,
) -> None:  # fmt: skip
    def attend(group: Any, rows: slice, qkv: Any, out: Any) -> None:
        for head, (q_at, k_at, v_at) in enumerate(_heads(qkv_ref.shape[1], heads)):
            q, k, v = qkv[rows, q_at], qkv[rows, k_at], qkv[rows, v_at]  # (m, d)
            weights = _softmax(q, k, bias_ref[head] + mask_ref[of_group[0, group]])  # (m, m)
            out[rows, q_at] = dot(weights.astype(v.dtype), v).astype(out.dtype)

    _for_groups(attend, tokens, qkv_ref, out_ref)


def _backward_kernel(
    of_group: Any, bias_ref: Any, mask_ref: Any, qkv_ref: Any, d_out_ref: Any,
    d_qkv_ref: Any, d_bias_ref: Any,
    *, heads: int, tokens: int,
) -> None:  # fmt: skip
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        d_bias_ref[...] = jnp.zeros_like(d_bias_ref)

    def differentiate(group: Any, rows: slice, qkv: Any, d_out: Any, d_qkv: Any) -> None:
        for head, (q_at, k_at, v_at) in enumerate(_heads(qkv_ref.shape[1], heads)):
            q, k, v = qkv[rows, q_at], qkv[rows, k_at], qkv[rows, v_at]  # (m, d)
            dy = d_out[rows, q_at]
            weights = _softmax(q, k, bias_ref[head] + mask_ref[of_group[0, group]])  # (m, m)
            d_weights = dot(dy, v.T)
            mean = jnp.sum(weights * d_weights, axis=1, keepdims=True)
            d_scores = weights * (d_weights - mean)
            d_bias_ref[head] += d_scores
            d_scores = (d_scores * q.shape[1] ** -0.5).astype(q.dtype)
            d_qkv[rows, q_at] = dot(d_scores, k).astype(d_qkv.dtype)
            d_qkv[rows, k_at] = dot(d_scores.T, q).astype(d_qkv.dtype)
            d_qkv[rows, v_at] = dot(weights.astype(dy.dtype).T, dy).astype(d_qkv.dtype)

    _for_groups(differentiate, tokens, qkv_ref, d_out_ref, d_qkv_ref)


def _for_groups(step: Callable[..., None], tokens: int, *refs: Any) -> None:
    """Calls `step(group, rows, *refs)` for each group of `tokens` tokens, a part of all rows.

    Successive groups that together fill whole tiles are one iteration of a loop, which keeps the
    program short; the step is given the part of each reference that the iteration is about.
    """
    groups = refs[0].shape[0] // tokens
    block = TILE_ROWS // math.gcd(TILE_ROWS, tokens)  # groups per iteration
    blocks = groups // block if groups > block else 0

    def in_loop(i: jax.Array, _: None) -> None:
        start = pl.multiple_of(i * (block * tokens), TILE_ROWS)
        parts = [ref.at[pl.ds(start, block * tokens)] for ref in refs]
        for group in range(block):
            step(i * block + group, slice(group * tokens, (group + 1) * tokens), *parts)

    if blocks:
        jax.lax.fori_loop(0, blocks, in_loop, None)
    for group in range(blocks * block, groups):
        step(group, slice(group * tokens, (group + 1) * tokens), *refs)


def _heads(columns: int, heads: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yields the columns of each head's queries, keys and values."""
    width = columns // (3 * heads)
    for head in range(heads):
        starts = range(head * width, columns, heads * width)
        q, k, v = (slice(start, start + width) for start in starts)
        yield q, k, v


def _softmax(q: jax.Array, k: jax.Array, bias: jax.Array) -> jax.Array:
    """softmax(Q K^T / sqrt(d) + bias) in float32: (m, d), (m, d), (m, m) -> (m, m)."""
    scores = dot(q, k.T) * q.shape[1] ** -0.5 + bias
    weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return weights / jnp.sum(weights, axis=1, keepdims=True)
