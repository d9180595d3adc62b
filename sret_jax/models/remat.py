"""Scans over the cycles of a recursion, and what their backward pass computes again.

All follow one signature, that of a body for `nn.scan`: body(module, carry, inputs) ->
(carry, None), the module's parameters the same at every step and the inputs' leading axis scanned.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

Body = Callable[[nn.Module, jax.Array, Any], tuple[jax.Array, None]]


def remat(part: Callable, *, dots: bool = False) -> Callable:
    """Lets the backward pass compute `part(module, ...)` again, from what entered it.

    Args:
      part: a function of a module and arrays.
      dots: keeps its matrix products with weights.
    """
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if dots else None
    return nn.remat(part, policy=policy)


def scan_cycles(
    body: Body, module: nn.Module, x: jax.Array, inputs: Any, *, segment: int | None, unroll: int
) -> jax.Array:
    """Applies `body` once for every row of `inputs`, one after the other.

    Args:
      body: of one cycle.
      module: handed to the body.
      x: the carry.
      inputs: a tree of arrays (cycles, ...).
      segment: None, or how many cycles the backward pass computes again as a whole, from the x
        that entered them: it then keeps cycles / segment of the outer scan's carries, and, for one
        segment at a time, what the inner scan keeps.
      unroll: cycles laid out side by side.

    Returns:
      The carry after the last cycle.
    """
    cycles = len(jax.tree.leaves(inputs)[0])
    scan = functools.partial(
        nn.scan,
        variable_broadcast="params",
        split_rngs={"params": False},
    )
    if segment is None:
        return scan(body, unroll=min(unroll, cycles))(module, x, inputs)[0]

    run_segment = remat(scan(body, unroll=min(unroll, segment)))
    segments, rest = divmod(cycles, segment)
    whole = jax.tree.map(
        lambda leaf: leaf[: cycles - rest].reshape(segments, segment, *leaf.shape[1:]), inputs
    )
    x, _ = scan(run_segment)(module, x, whole)
    if rest:
        x, _ = run_segment(module, x, jax.tree.map(lambda leaf: leaf[cycles - rest :], inputs))
    return x


def segment_length(cycles: int) -> int:
    """About sqrt(cycles): a divisor of them where there is one near, so that no rest is left."""
    root = max(1, math.isqrt(cycles))
    return next((n for n in range(root, root // 2, -1) if cycles % n == 0), root)
