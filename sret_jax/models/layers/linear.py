"""Linear maps, norms and MLPs, and the settings that all layers of a model share."""

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from sret_jax.models.kernels.choice import KERNELS, Kernels

Initializer = Callable[..., jax.Array]


def fan_in_uniform(fan_in: int) -> Initializer:
    """Returns an initializer drawing from U(-1/sqrt(fan_in), +1/sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


@dataclasses.dataclass(frozen=True)
class Initialisation:
    """How linear maps start: two functions of the fan-in that return initializers."""

    kernel: Callable[[int], Initializer]
    bias: Callable[[int], Initializer]


# SReT: weights and biases are drawn from U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
FAN_IN = Initialisation(fan_in_uniform, fan_in_uniform)
# ViT and its successors: weights are drawn from N(0, 0.02^2), biases are 0. The original truncates
# at 100 standard deviations, which is never.
NORMAL = Initialisation(
    lambda _: nn.initializers.normal(0.02), lambda _: nn.initializers.zeros_init()
)


class Linear(nn.Dense):
    """x -> x W + b: (..., fan_in) -> (..., features).

    On CPUs all axes but the last are joined: that avoids a copy and a transposition of what the
    gradient sums over two axes. On a TPU it would move the 196 tokens of each image between tiles.

    Attributes:
      mesh: the devices that the program is compiled for, if known.
    """

    mesh: Mesh | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        if not on_cpus(self.mesh):
            return super().__call__(x)
        out = super().__call__(x.reshape(-1, x.shape[-1]))
        return out.reshape(*x.shape[:-1], self.features)


def on_cpus(mesh: Mesh | None) -> bool:
    """Whether the program is known to be compiled for CPUs."""
    return mesh is not None and mesh.devices.flat[0].platform == "cpu"


@dataclasses.dataclass(frozen=True)
class LayerSettings:
    """What all layers of a model have in common.

    Attributes:
      kernels: which parts run as fused kernels, and on which devices.
      dtype: dtype of activations and matrix products; parameters are float32.
      start: initialisation of linear maps.
      epsilon: added to LayerNorm's variance.
      residual: "learned": residual sums have learned coefficients; "plain": x + y.
      branch_init: initial value of the coefficient of every residual branch.
    """

    kernels: Kernels = KERNELS
    dtype: DTypeLike = jnp.float32
    start: Initialisation = FAN_IN
    epsilon: float = 1e-6
    residual: str = "learned"
    branch_init: float = 1.0

    def wide(self) -> "LayerSettings":
        """The same settings in at least float32, for the classification head."""
        return dataclasses.replace(self, dtype=jnp.promote_types(self.dtype, jnp.float32))

    def linear(self, features: int, fan_in: int, *, bias: bool = True, name: str) -> Linear:
        """A linear map R^fan_in -> R^features."""
        return Linear(
            features,
            use_bias=bias,
            dtype=self.dtype,
            kernel_init=self.start.kernel(fan_in),
            bias_init=self.start.bias(fan_in),
            mesh=self.kernels.mesh,
            name=name,
        )

    def layer_norm(self, *, name: str) -> nn.LayerNorm:
        """LayerNorm over channels, with statistics in at least float32."""
        return nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name=name)


def gelu(x: jax.Array) -> jax.Array:
    """x/2 (1 + erf(x / sqrt(2))), the exact GELU, computed in at least float32.

    `nn.gelu` calls erfc, which takes three times as long on a CPU.
    """
    h = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (h / 2 * (1 + jax.lax.erf(h * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS = {"gelu": gelu, "none": lambda x: x}


class MLP(nn.Module):
    """x -> W2 GELU(W1 x + b1) + b2, with the exact (erf) GELU, or none with activation="none".

    Shapes: (..., C) -> (..., hidden) -> (..., C).
    """

    hidden: int
    layers: LayerSettings = LayerSettings()
    activation: str = "gelu"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        x = self.layers.linear(self.hidden, channels, name="fc1")(x)
        x = ACTIVATIONS[self.activation](x)
        return self.layers.linear(channels, self.hidden, name="fc2")(x)
