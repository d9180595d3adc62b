"""Sliced attention as one TPU kernel: scores and softmax never leave the chip's fast memory.

For every slice G of the tokens and every head of width d (SReT section 3.4):

    P = softmax(Q_G K_G^T / sqrt(d)),  O_G = P V_G.

The backward pass recomputes P from Q and K instead of storing it:

    dV = P^T dO,  dP = dO V^T,  dS = P * (dP - rowsum(P * dP)) / sqrt(d),  dQ = dS K,  dK = dS^T Q.

One grid step processes one image with all its slices and heads, so slices and heads need not fit
the memory's tiles, and each operand is read and written once. The kernel itself permutes the tokens
into the slices' order and back, so main memory holds them in raster order only. Where the scores of
one head would not fit in fast memory, the kernel splits the head's queries into blocks.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sret_jax.models.kernels.choice import (
    FAST_MEMORY,
    ROWS,
    TILE_ROWS,
    cost,
    dot,
    knows,
    tiled_bytes,
)
from sret_jax.models.kernels.row_order import gather_rows, row_planes, scatter_rows

LEAST_QUERIES = 64  # per block; smaller blocks would transpose K and V too often

Shape = jax.Array | jax.ShapeDtypeStruct
Columns = tuple[slice, slice, slice]  # the columns of one head's queries, keys and values
T = TypeVar("T")
Residuals = tuple[jax.Array, jax.Array | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def fused_attention(
    qkv: jax.Array, permutation: jax.Array | None, heads: int, groups: int, interpret: bool
) -> jax.Array:
    """Attention inside each of `groups` equal slices of the permuted tokens, for all heads.

    Args:
      qkv: (B, N, 3 * heads * d), small enough for `can_hold`: queries, keys and values, each with
        its heads side by side.
      permutation: (N,). Token i in the slices' order is token permutation[i] of qkv; None: token i.
      heads: number of heads.
      groups: number of slices; it must divide N.
      interpret: runs the kernel step by step on any device.

    Returns:
      (B, N, heads * d) in qkv's dtype and token order. Scores and softmax are float32.
    """
    return _forward(qkv, permutation, heads, groups, interpret)[0]


def can_hold(qkv: Shape, heads: int, groups: int, *, permuted: bool) -> bool:
    """Whether the kernel's data fit in fast memory; `permuted` adds what its permutation needs."""
    return knows(qkv.dtype) and _queries(qkv, heads, groups, permuted=permuted) > 0


def _queries(qkv: Shape, heads: int, groups: int, *, permuted: bool) -> int:
    """Queries per block: as many as fit, in equal blocks of whole tiles; 0 if hardly any fit.

    The backward pass needs the most memory. It holds QKV, dO and dQKV twice, to load the next
    image in time. To permute, it holds copies of QKV and dO and two float32 arrays of QKV's size.
    For one head it holds, in float32, four arrays of (n, d), which are K, V and their gradients,
    and four of (queries, n).
    """
    _, tokens, channels = qkv.shape
    n, wide = tokens // groups, jnp.float32
    inputs = [tiled_bytes((tokens, c), qkv.dtype) for c in (channels, channels // 3)]
    held = 2 * (sum(inputs) + inputs[0]) + 4 * tiled_bytes((n, channels // (3 * heads)), wide)
    if permuted:
        held += sum(inputs) + 2 * tiled_bytes((tokens, channels), wide)
    most = (FAST_MEMORY - held) // (4 * tiled_bytes((ROWS, n), wide) // ROWS)
    if most >= n:
        return n
    whole_tiles = groups == 1 or n % TILE_ROWS == 0  # where slices begin
    if most < LEAST_QUERIES or not whole_tiles:
        return 0
    blocks = pl.cdiv(n, most // TILE_ROWS * TILE_ROWS)
    return pl.cdiv(n, blocks * TILE_ROWS) * TILE_ROWS


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _forward(
    qkv: jax.Array, permutation: jax.Array | None, heads: int, groups: int, interpret: bool
) -> tuple[jax.Array, Residuals]:
    batch, tokens, channels = qkv.shape
    out = jax.ShapeDtypeStruct((batch, tokens, channels // 3), qkv.dtype)
    call = _kernel_call(_forward_kernel, (qkv,), out, permutation, heads, groups, 2, interpret)
    return call(qkv), (qkv, permutation)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(
    heads: int, groups: int, interpret: bool, residuals: Residuals, d_out: jax.Array
) -> tuple[jax.Array, None]:
    qkv, permutation = residuals
    operands = (qkv, d_out)
    call = _kernel_call(_backward_kernel, operands, qkv, permutation, heads, groups, 5, interpret)
    return call(*operands), None


fused_attention.defvjp(_forward, _backward)


def _kernel_call(
    kernel: Callable,
    operands: tuple[Shape, ...],
    out: Shape,
    permutation: jax.Array | None,
    heads: int,
    groups: int,
    matmuls: int,
    interpret: bool,
) -> Callable[..., Any]:
    """Runs `kernel`, which computes `matmuls` products of (n, n) with d per slice and head."""
    batch, tokens, channels = operands[0].shape
    scores = batch * heads * tokens * (tokens // groups)
    queries = _queries(operands[0], heads, groups, permuted=permutation is not None)
    kernel = functools.partial(kernel, heads=heads, groups=groups, queries=queries)
    order: tuple[jax.Array, ...] = ()
    scratch: list[Any] = []
    if permutation is not None:
        order = (permutation.astype(jnp.int32)[None],)
        kernel = functools.partial(_in_slices, kernel)
        copies = [pltpu.VMEM(x.shape[1:], x.dtype) for x in operands]
        scratch = [*row_planes(tokens, channels), *copies]
    call = pl.pallas_call(
        kernel,
        grid=(batch,),
        in_specs=[*map(_order, order), *map(_image, operands)],
        out_specs=_image(out),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        scratch_shapes=scratch,
        cost_estimate=cost(
            matmuls * scores * channels // (3 * heads), scores, (*order, *operands, out)
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
    )
    return functools.partial(call, *order)


def _order(order: Shape) -> pl.BlockSpec:
    return pl.BlockSpec(order.shape, lambda image: (0, 0), memory_space=pltpu.SMEM)


def _image(x: Shape) -> pl.BlockSpec:
    return pl.BlockSpec((None, *x.shape[1:]), lambda image: (image, 0, 0))


def _in_slices(kernel: Callable, order: Any, *refs: Any) -> None:
    """Runs `kernel` on copies of its inputs whose tokens are in the slices' order.

    The kernel overwrites its inputs with its results: O replaces Q; dQ, dK and dV replace Q, K, V.
    """
    count = len(refs) // 2
    (*inputs, out), planes, copies = refs[:count], refs[count : count + 2], refs[count + 2 :]
    for source, copy in zip(inputs, copies, strict=True):
        gather_rows(order, source, copy, planes)
    kernel(*copies, copies[0])
    scatter_rows(order, copies[0], out, planes)


def _forward_kernel(qkv_ref: Any, out_ref: Any, *, heads: int, groups: int, queries: int) -> None:
    for rows, columns in _slices(qkv_ref.shape, heads, groups):
        _attend(qkv_ref, out_ref, rows, columns, queries)


def _attend(qkv_ref: Any, out_ref: Any, rows: slice, columns: Columns, queries: int) -> None:
    """Computes O of one head in the slice at `rows`."""
    q_at, k_at, v_at = columns

    def block(at: Any, nothing: tuple) -> tuple:
        k, v = qkv_ref[rows, k_at], qkv_ref[rows, v_at]  # (n, d)
        weights = _softmax(qkv_ref[at, q_at], k)  # (queries, n)
        out_ref[at, q_at] = dot(weights.astype(v.dtype), v).astype(out_ref.dtype)
        return nothing

    _in_blocks(rows, queries, block, ())


def _backward_kernel(
    qkv_ref: Any, d_out_ref: Any, d_qkv_ref: Any, *, heads: int, groups: int, queries: int
) -> None:
    for rows, columns in _slices(qkv_ref.shape, heads, groups):
        _differentiate(qkv_ref, d_out_ref, d_qkv_ref, rows, columns, queries)


def _differentiate(
    qkv_ref: Any, d_out_ref: Any, d_qkv_ref: Any, rows: slice, columns: Columns, queries: int
) -> None:
    """Computes dQ, dK and dV of one head in the slice at `rows`."""
    q_at, k_at, v_at = columns

    def block(at: Any, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dk, dv = sums
        k, v = qkv_ref[rows, k_at], qkv_ref[rows, v_at]  # (n, d)
        q, d_out = qkv_ref[at, q_at], d_out_ref[at, q_at]
        weights = _softmax(q, k)  # (queries, n)
        d_weights = dot(d_out, v.T)
        mean = jnp.sum(weights * d_weights, axis=1, keepdims=True)
        d_scores = weights * (d_weights - mean) * q.shape[1] ** -0.5
        d_scores = d_scores.astype(q.dtype)
        d_qkv_ref[at, q_at] = dot(d_scores, k).astype(d_qkv_ref.dtype)
        return dk + dot(d_scores.T, q), dv + dot(weights.astype(d_out.dtype).T, d_out)

    zeros = jnp.zeros((rows.stop - rows.start, k_at.stop - k_at.start), jnp.float32)
    dk, dv = _in_blocks(rows, queries, block, (zeros, zeros))
    d_qkv_ref[rows, k_at] = dk.astype(d_qkv_ref.dtype)
    d_qkv_ref[rows, v_at] = dv.astype(d_qkv_ref.dtype)


def _in_blocks(rows: slice, size: int, step: Callable[[Any, T], T], carry: T) -> T:
    """Runs `step` on blocks of `size` queries, and on the remaining queries.

    Since it is a loop, the compiler allocates memory for one block only.
    """
    blocks, rest = divmod(rows.stop - rows.start, size)
    if blocks == 1 and not rest:
        return step(rows, carry)

    def body(i: jax.Array, carry: T) -> T:
        place = pl.multiple_of(rows.start + i * size, TILE_ROWS)
        return step(pl.ds(place, size), carry)

    carry = jax.lax.fori_loop(0, blocks, body, carry)
    return step(slice(rows.stop - rest, rows.stop), carry) if rest else carry


def _slices(shape: tuple[int, int], heads: int, groups: int) -> Iterator[tuple[slice, Columns]]:
    """Yields the rows of each slice with the columns of each head."""
    tokens, width = shape[0] // groups, shape[1] // (3 * heads)
    for group in range(groups):
        for head in range(heads):
            q, k, v = (slice(s, s + width) for s in range(head * width, shape[1], heads * width))
            yield slice(group * tokens, (group + 1) * tokens), (q, k, v)


def _softmax(q: jax.Array, k: jax.Array) -> jax.Array:
    """softmax(Q K^T / sqrt(d)) in float32: (queries, d), (keys, d) -> (queries, keys)."""
    scores = dot(q, k.T) * q.shape[1] ** -0.5
    weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return weights / jnp.sum(weights, axis=1, keepdims=True)
