"""Scans over the cycles of a recursion, with a choice of what their backward pass recomputes.

All bodies have the signature that `nn.scan` expects: body(module, carry, inputs) returns the carry
and its outputs. The module's parameters are the same at every step; the inputs are scanned along
their leading axis, and the outputs are stacked along one.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Body = Callable[[nn.Module, jax.Array, Any], tuple[jax.Array, Any]]


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
) -> tuple[jax.Array, Any]:
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
      The carry after the last cycle, and the body's outputs (cycles, ...).
    """
    scan = functools.partial(
        nn.scan,
        variable_broadcast="params",
        split_rngs={"params": False},
    )
    if segment is None:
        carry, outputs = scan(body, length=cycles, unroll=min(unroll, cycles))(module, x, inputs)
        return carry, outputs

    def run_segment(length: int) -> Callable:
        return remat(scan(body, length=length, unroll=min(unroll, length)))

    segments, rest = divmod(cycles, segment)
    whole = jax.tree.map(
        lambda leaf: leaf[: cycles - rest].reshape(segments, segment, *leaf.shape[1:]), inputs
    )
    x, outputs = scan(run_segment(segment), length=segments)(module, x, whole)
    outputs = joined(outputs)
    if rest:
        last = jax.tree.map(lambda leaf: leaf[cycles - rest :], inputs)
        x, of_rest = run_segment(rest)(module, x, last)
        outputs = jax.tree.map(lambda *parts: jnp.concatenate(parts), outputs, of_rest)
    return x, outputs


def joined(tree: Any) -> Any:
    """Joins the two leading axes of every array: (a, b, ...) -> (a * b, ...)."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


def segment_length(cycles: int) -> int:
    """About sqrt(cycles), and a divisor of `cycles` if one is near, so that none is left over."""
    root = max(1, math.isqrt(cycles))
    return next((n for n in range(root, root // 2, -1) if cycles % n == 0), root)
