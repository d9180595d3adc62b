"""Finds the largest batch that fits, in few compilations."""

import math
from collections.abc import Callable

MOST_COMPILATIONS = 8


def largest_batch(
    needed: Callable[[int], int], available: int, *, unit: int, first: int, fixed: int
) -> tuple[int, int]:
    """Finds the largest multiple of `unit` that fits, or nearly the largest.

    Memory is close to affine in the batch. So a line through the two known batches nearest to the
    limit predicts the largest batch that fits, and that one is compiled. The search ends when one
    batch is known to fit and the next is known or predicted not to.

    Near the limit the compiler recomputes more of the forward pass; memory then hardly grows and
    the line predicts too much. So if a predicted batch did not fit, or the prediction lies beyond
    one that did not, the search bisects the range between known fits and known misfits.

    Args:
      needed: maps a batch to the bytes needed on one device; it compiles.
      available: bytes available on one device.
      unit: every batch is a multiple of this.
      first: the first batch to try.
      fixed: bytes needed whatever the batch.

    Returns:
      The batch (0 if none fits) and the number of compilations.
    """
    known = {0: fixed}
    fits, too_large = 0, math.inf
    batch = first
    while len(known) <= MOST_COMPILATIONS:
        known[batch] = needed(batch)
        overshot = known[batch] > available and batch != first
        if known[batch] <= available:
            fits = batch
        else:
            too_large = batch
        predicted = _predict(known, available) // unit * unit
        if fits and predicted <= fits:
            break
        batch = max(predicted, fits + unit)
        if overshot or batch >= too_large:
            batch = int(fits + too_large) // 2 // unit * unit
        if batch <= fits:
            break
    return fits, len(known) - 1


def _predict(known: dict[int, int], available: int) -> int:
    """The batch at which the line through the two batches nearest to the limit reaches it.

    For larger batches the compiler may recompute so much that memory hardly grows, or shrinks. So
    the line is at least a quarter as steep as the growth of memory so far.
    """
    a, b = sorted(sorted(known, key=lambda batch: abs(known[batch] - available))[:2])
    grown = (known[b] - known[0]) / b
    slope = max(1.0, grown / 4, (known[b] - known[a]) / (b - a))
    return math.floor(b + (available - known[b]) / slope)
