"""The largest batch that fits, in few compilations."""

import math
from collections.abc import Callable

MOST_COMPILATIONS = 8


def largest_batch(
    needed: Callable[[int], int], available: int, *, unit: int, first: int, fixed: int
) -> tuple[int, int]:
    """The largest multiple of `unit` that fits, or nearly.

    Memory is close to affine in the batch. So a line through the two known batches nearest to the
    limit predicts the largest that fits, which is tried; until one is known to fit and the next
    either known or predicted not to. Near the limit the compiler computes more of the forward pass
    again, memory hardly grows, and the line points too far. So where a batch that it pointed to did
    not fit, or where it points beyond one that did not, the range between what is known to fit and
    what is known not to is halved.

    Args:
      needed: batch -> bytes on one device; it compiles.
      available: bytes on one device.
      unit: what a batch is a multiple of.
      first: the batch to begin with.
      fixed: bytes that are needed whatever the batch.

    Returns:
      The batch, 0 where none fits, and the number of compilations.
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

    Of a larger batch the compiler may compute so much again that it needs hardly more memory, or
    less. So the line is at least a quarter as steep as memory has grown so far.
    """
    a, b = sorted(sorted(known, key=lambda batch: abs(known[batch] - available))[:2])
    grown = (known[b] - known[0]) / b
    slope = max(1.0, grown / 4, (known[b] - known[a]) / (b - a))
    return math.floor(b + (available - known[b]) / slope)
