"""Decides where a part of the model runs as a fused TPU kernel; helpers that all kernels share."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

# "auto": the kernel where the step is lowered for a TPU, XLA elsewhere. "xla", "pallas": this one
# on all devices. What does not fit in a TPU's fast memory is always left to XLA.
IMPLEMENTATIONS = ("auto", "xla", "pallas")

ROWS, LANES = 8, 128  # memory stores arrays in tiles of so many rows and columns
TILE_ROWS = 2 * ROWS  # bfloat16 packs two rows into one
CORES = 2  # a chip may split a grid's first axis over so many cores; each sums its own gradients
FAST_MEMORY = 16 << 20  # bytes that a kernel may use on any chip


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Which parts run as kernels, and on which devices. This changes speed and memory only.

    Attributes:
      attention, mlp: one of `IMPLEMENTATIONS`. Off a TPU, "pallas" interprets the kernel.
      mesh: the devices over which images are split, because XLA cannot split a kernel; None: the
        one device that the program is lowered for.
    """

    attention: str = "auto"
    mlp: str = "auto"
    mesh: Mesh | None = None

    def choose(
        self, implementation: str, kernel: Callable[..., jax.Array], plain: Callable, images: int
    ) -> Callable[..., jax.Array]:
        """Returns a function that runs either `kernel` or `plain`, which compute the same.

        Args:
          implementation: `self.attention` or `self.mlp`.
          kernel: takes arrays and `interpret`.
          plain: takes the same arrays.
          images: the first `images` arguments have a leading batch axis and are split over the
            devices; the other arguments are replicated.
        """
        if implementation == "xla":
            return plain
        fused = self._on_each_device(functools.partial(kernel, interpret=False), images)
        interpreted = self._on_each_device(functools.partial(kernel, interpret=True), images)
        elsewhere = plain if implementation == "auto" else interpreted
        if self.mesh is not None:
            return fused if runs_kernels(self.mesh.devices.flat[0]) else elsewhere
        return lambda *args: jax.lax.platform_dependent(*args, tpu=fused, default=elsewhere)

    def _on_each_device(self, kernel: Callable, images: int) -> Callable:
        if self.mesh is None:
            return kernel
        spread = PartitionSpec(self.mesh.axis_names)

        def run(*args: Any) -> jax.Array:
            specs = (spread,) * images + (PartitionSpec(),) * (len(args) - images)
            return jax.shard_map(
                kernel, mesh=self.mesh, in_specs=specs, out_specs=spread, check_vma=False
            )(*args)

        return run


KERNELS = Kernels()


def runs_kernels(device: Any) -> bool:
    """Whether the device is a TPU whose kernels can multiply bfloat16 matrices."""
    return device.platform == "tpu" and device.device_kind not in ("TPU v2", "TPU v3")


def knows(dtype: DTypeLike) -> bool:
    """Whether kernels support the dtype: bfloat16 or float32, since a TPU has no float64."""
    return jnp.dtype(dtype).itemsize <= 4


def cost(
    products: int, transcendentals: int, arrays: Sequence[jax.Array | jax.ShapeDtypeStruct]
) -> pl.CostEstimate:
    """The cost that XLA and plans count for a kernel that reads or writes each array once.

    Args:
      products: number of multiply-accumulates.
      transcendentals: number of exponentials and similar functions.
      arrays: operands and results.
    """
    return pl.CostEstimate(
        flops=2 * products,
        transcendentals=transcendentals,
        bytes_accessed=sum(tiled_bytes(x.shape, x.dtype) for x in arrays),
    )


def tiled_bytes(shape: Sequence[int], dtype: Any) -> int:
    """Bytes of an array in memory, where its last two axes are padded to tiles."""
    *leading, rows, lanes = shape
    padded = -(-rows // ROWS) * ROWS * (-(-lanes // LANES) * LANES)
    return math.prod(leading) * padded * jnp.dtype(dtype).itemsize


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """The matrix product of a and b, accumulated in float32."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
