"""Scans over the cycles of a recursion, with a choice of what their backward pass recomputes.

All bodies have the signature that `nn.scan` expects, body(module, carry, inputs) -> (carry, None).
The module's parameters are the same at every step; the inputs are scanned along their leading axis.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

Body = Callable[[nn.Module, jax.Array, Any], tuple[jax.Array, None]]


def remat(part: Callable, *, dots: bool = False) -> Callable:
    """Makes the backward pass recompute `part(module, ...)` from its inputs.

    Args:
      part: a function of a module and arrays.
      dots: stores the part's matrix products with weights instead of recomputing them.
    """
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if dots else None
    return nn.remat(part, policy=policy)


def scan_cycles(
    body: Body,
    module: nn.Module,
    x: jax.Array,
    inputs: Any,
    *,
    cycles: int,
    segment: int | None,
    unroll: int,
) -> jax.Array:
    """Applies `body` `cycles` times in sequence, each time with another row of `inputs`.

    Args:
      body: computes one cycle.
      module: passed to the body.
      x: the carry.
      inputs: a tree of arrays (cycles, ...).
      cycles: number of applications of the body.
      segment: cycles per checkpointed segment; None: no segments. The forward pass stores one
        activation per segment; the backward pass recomputes one segment at a time from it.
      unroll: cycles per step of the scan.

    Returns:
      The carry after the last cycle.
    """
    scan = functools.partial(
        nn.scan,
        variable_broadcast="params",
        split_rngs={"params": False},
    )
    if segment is None:
        return scan(body, length=cycles, unroll=min(unroll, cycles))(module, x, inputs)[0]

    def run_segment(length: int) -> Callable:
        return remat(scan(body, length=length, unroll=min(unroll, length)))

    segments, rest = divmod(cycles, segment)
    whole = jax.tree.map(
        lambda leaf: leaf[: cycles - rest].reshape(segments, segment, *leaf.shape[1:]), inputs
    )
    x, _ = scan(run_segment(segment), length=segments)(module, x, whole)
    if rest:
        last = jax.tree.map(lambda leaf: leaf[cycles - rest :], inputs)
        x, _ = run_segment(rest)(module, x, last)
    return x


def segment_length(cycles: int) -> int:
    """About sqrt(cycles), and a divisor of `cycles` if one is near, so that none is left over."""
    root = max(1, math.isqrt(cycles))
    return next((n for n in range(root, root // 2, -1) if cycles % n == 0), root)
