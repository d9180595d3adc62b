"""The device mesh, (data, fsdp), and the shardings of batches and training state."""

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sret_jax.errors import UserError

BATCH_AXES = ("data", "fsdp")
MIN_SHARDED_SIZE = 1024
BLOCK = re.compile(r"stage\d+_block\d+")  # names of unique blocks


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh of all devices with axes data x fsdp.

    Args:
      fsdp: number of devices that parameters and optimizer state are split over; data is the
        number of devices divided by fsdp.
      devices: devices to compile for; default: all devices of this run.

    Raises:
      UserError: fsdp does not divide the number of devices.
    """
    size = jax.device_count() if devices is None else len(devices)
    if fsdp < 1 or size % fsdp:
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        raise UserError(
            f"config.fsdp={fsdp} does not divide the {size} devices; use one of {divisors}"
        )
    shape = (size // fsdp, fsdp)
    return jax.make_mesh(shape, BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def process_count(mesh: Mesh) -> int:
    """The number of processes that drive the mesh's devices."""
    return len({device.process_index for device in mesh.devices.flat})


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis over all devices of the mesh."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Places the same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(abstract_state: Any, mesh: Mesh) -> Any:
    """Shards each array of at least 1,024 elements along its largest axis divisible by fsdp.

    All other arrays are replicated. The axis that a scan runs over is never split, because every
    device would need all of it.

    Args:
      abstract_state: a tree of arrays or `jax.ShapeDtypeStruct`.
      mesh: from `make_mesh`.

    Returns:
      The tree of NamedShardings.
    """
    fsdp = mesh.shape["fsdp"]

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        first = is_stacked(getattr(part, "key", None) for part in path)  # True: axis 0 is scanned
        axes = [i for i, n in enumerate(leaf.shape) if i >= first and n % fsdp == 0]
        if fsdp == 1 or math.prod(leaf.shape) < MIN_SHARDED_SIZE or not axes:
            return replicated(mesh)
        largest = max(axes, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, "fsdp"))

    return jax.tree_util.tree_map_with_path(sharding, abstract_state)


def is_stacked(path: Iterable[Any]) -> bool:
    """Whether an array stacks rows of loops, over which a scan runs: those of NLLs and adapters.

    They are what a unique block has beside its shared part, "block".
    """
    return any(
        isinstance(name, str) and BLOCK.fullmatch(name) and inside != "block"
        for name, inside in itertools.pairwise(path)
    )


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Joins a tree of shapes with a tree of shardings, as a target to restore or compile for."""
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        abstract,
        shardings,
    )
