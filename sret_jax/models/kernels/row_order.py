"""Reorders the rows of an array inside a TPU kernel's fast memory.

At a position known at run time only, a kernel can address a single row only in 32-bit words; this
is fastest in arrays no wider than a tile. So rows are moved as float32, in planes of 128 columns.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sret_jax.models.kernels.choice import LANES

UNROLL = 16  # rows moved per iteration

Planes = tuple[Any, Any]


def row_planes(rows: int, columns: int) -> list[Any]:
    """Scratch memory to which arrays of at most `columns` columns are copied plane by plane."""
    planes = pltpu.VMEM((pl.cdiv(columns, LANES), rows, LANES), jnp.float32)
    return [planes, planes]


def gather_rows(order: Any, source: Any, target: Any, planes: Planes) -> None:
    """target[i] = source[order[i]], for as many columns as the target has.

    Args:
      order: (1, rows) in scalar memory.
      source: (rows, columns) of at most 32 bits.
      target: an array like the source; it may be the source itself.
      planes: scratch from `row_planes`.
    """
    apart, together = planes

    def move(plane: int, i: jax.Array) -> None:
        together[plane, pl.ds(i, 1)] = apart[plane, pl.ds(order[0, i], 1)]

    _through_planes(source, target, planes, move)


def scatter_rows(order: Any, source: Any, target: Any, planes: Planes) -> None:
    """target[order[i]] = source[i], for as many columns as the target has.

    Args:
      order: a permutation (1, rows) in scalar memory.
      source: (rows, columns) of at most 32 bits.
      target: an array like the source; it may be the source itself.
      planes: scratch from `row_planes`.
    """
    apart, together = planes

    def move(plane: int, i: jax.Array) -> None:
        together[plane, pl.ds(order[0, i], 1)] = apart[plane, pl.ds(i, 1)]

    _through_planes(source, target, planes, move)


def _through_planes(
    source: Any, target: Any, planes: Planes, move: Callable[[int, jax.Array], None]
) -> None:
    apart, together = planes
    rows, columns = target.shape
    parts = [slice(start, min(start + LANES, columns)) for start in range(0, columns, LANES)]

    def move_row(i: jax.Array, _: None) -> None:
        for plane in range(len(parts)):
            move(plane, i)

    for plane, part in enumerate(parts):
        apart[plane, :, : part.stop - part.start] = source[:, part].astype(jnp.float32)
    jax.lax.fori_loop(0, rows, move_row, None, unroll=UNROLL)
    for plane, part in enumerate(parts):
        target[:, part] = together[plane, :, : part.stop - part.start].astype(target.dtype)
