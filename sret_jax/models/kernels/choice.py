"""Where a part of the model runs as one fused TPU kernel, and what all such kernels share."""

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

# The kernel where the step is lowered for a TPU and XLA elsewhere, or one of them everywhere; what
# is too large for a TPU's fast memory is left to XLA.
IMPLEMENTATIONS = ("auto", "xla", "pallas")

ROWS, LANES = 8, 128  # arrays lie in memory in tiles of so many rows and columns
FAST_MEMORY = 16 << 20  # bytes that every chip lets a kernel have


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Which parts run as kernels, and on which devices; it changes speed and memory only.

    Attributes:
      attention, mlp: one of `IMPLEMENTATIONS`. Off a TPU, "pallas" interprets the kernel.
      mesh: the devices over which images are spread, since XLA cannot split a kernel; None for
        the one device that the program will be lowered for.
    """

    attention: str = "auto"
    mlp: str = "auto"
    mesh: Mesh | None = None

    @property
    def joins_tokens(self) -> bool:
        """Whether linear maps and gradients see the tokens of all images on one axis.

        XLA:CPU copies and transposes what a gradient sums over two axes. On a TPU, joining the 196
        tokens of each image would move them between tiles.
        """
        return self.mesh is not None and self.mesh.devices.flat[0].platform == "cpu"

    def choose(
        self, implementation: str, kernel: Callable[..., jax.Array], plain: Callable, images: int
    ) -> Callable[..., jax.Array]:
        """The function that computes what both `kernel` and `plain` do.

        Args:
          implementation: `attention` or `mlp` of this.
          kernel: takes arrays and `interpret`.
          plain: takes the same arrays.
          images: how many of them, the first, have a leading axis of images; the rest is the same
            on every device.
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


def runs_kernels(device: Any) -> bool:
    """Whether it is a TPU whose kernels can multiply bfloat16 matrices."""
    return device.platform == "tpu" and device.device_kind not in ("TPU v2", "TPU v3")


def knows(dtype: DTypeLike) -> bool:
    """Whether kernels compute in it: bfloat16 or float32, since a TPU has no float64."""
    return jnp.dtype(dtype).itemsize <= 4


def cost(
    products: int, transcendentals: int, arrays: Sequence[jax.Array | jax.ShapeDtypeStruct]
) -> pl.CostEstimate:
    """What XLA and plans count for a kernel that reads or writes each of `arrays` once.

    Args:
      products: multiply-accumulates.
      transcendentals: exponentials and the like.
      arrays: operands and results.
    """
    return pl.CostEstimate(
        flops=2 * products,
        transcendentals=transcendentals,
        bytes_accessed=sum(tiled_bytes(x.shape, x.dtype) for x in arrays),
    )


def tiled_bytes(shape: Sequence[int], dtype: Any) -> int:
    """Bytes that an array of two or more axes takes in memory, its last two padded to tiles."""
    *leading, rows, lanes = shape
    padded = -(-rows // ROWS) * ROWS * (-(-lanes // LANES) * LANES)
    return math.prod(leading) * padded * jnp.dtype(dtype).itemsize


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """The matrix product of a and b, accumulated in float32."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
