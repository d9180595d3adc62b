"""Rows of an array in another order, inside a TPU kernel's fast memory.

A kernel can address one row of 32-bit words at a place known at run time only, and does so fastest
where its array is no wider than a tile. So rows move as float32, in planes of 128 columns.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sret_jax.models.kernels.choice import LANES

UNROLL = 16  # rows moved side by side

Planes = tuple[Any, Any]


def row_planes(rows: int, columns: int) -> list[Any]:
    """The scratch in which arrays of at most that many columns are taken apart and put together."""
    planes = pltpu.VMEM((pl.cdiv(columns, LANES), rows, LANES), jnp.float32)
    return [planes, planes]


def gather_rows(order: Any, source: Any, target: Any, planes: Planes) -> None:
    """target[i] = source[order[i]], in as many columns as the target has.

    Args:
      order: (1, rows) in scalar memory.
      source: (rows, columns) of at most 32 bits.
      target: the same; it may be the source.
      planes: of `row_planes`.
    """
    apart, together = planes

    def move(plane: int, i: jax.Array) -> None:
        together[plane, pl.ds(i, 1)] = apart[plane, pl.ds(order[0, i], 1)]

    _through_planes(source, target, planes, move)


def scatter_rows(order: Any, source: Any, target: Any, planes: Planes) -> None:
    """target[order[i]] = source[i], in as many columns as the target has.

    Args:
      order: a permutation (1, rows) in scalar memory.
      source: (rows, columns) of at most 32 bits.
      target: the same; it may be the source.
      planes: of `row_planes`.
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
