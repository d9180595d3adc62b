"""The small layers of SReT: linear maps, MLP, drop path, stem, pooling.

All follow the published initialisation: weights *and biases* of linear and convolution
layers are drawn from U(-1/sqrt(fan_in), +1/sqrt(fan_in)).
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from sret_jax.models.convolution import flat_convolution, grouped_convolution

LAYER_NORM_EPSILON = 1e-6


def fan_in_uniform(fan_in: int) -> Callable[..., jax.Array]:
    """Returns an initializer drawing from U(-1/sqrt(fan_in), +1/sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


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


def linear(
    features: int,
    fan_in: int,
    *,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    name: str | None = None,
) -> Linear:
    """A linear map with bias, R^fan_in -> R^features, initialised as published."""
    init = fan_in_uniform(fan_in)
    return Linear(features, dtype=dtype, kernel_init=init, bias_init=init, mesh=mesh, name=name)


def layer_norm(*, dtype: DTypeLike, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm over channels with eps 1e-6 and statistics in at least float32."""
    return nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, dtype=dtype, name=name)


def gelu(x: jax.Array) -> jax.Array:
    """x/2 (1 + erf(x / sqrt(2))), the exact GELU, computed in at least float32.

    `nn.gelu` calls erfc, which takes three times as long on a CPU.
    """
    h = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (h / 2 * (1 + jax.lax.erf(h * math.sqrt(0.5)))).astype(x.dtype)


class MLP(nn.Module):
    """x -> W2 GELU(W1 x + b1) + b2, with the exact (erf) GELU.

    Shapes: (..., C) -> (..., hidden) -> (..., C). For `mesh`, see `Linear`.
    """

    hidden: int
    dtype: DTypeLike = jnp.float32
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        same: dict[str, Any] = dict(dtype=self.dtype, mesh=self.mesh)
        x = gelu(linear(self.hidden, channels, **same, name="fc1")(x))
        return linear(channels, self.hidden, **same, name="fc2")(x)


def drop_path_factors(key: jax.Array | None, rate: float, batch: int) -> jax.Array:
    """The factor that stochastic depth gives a branch: 0 with probability `rate`, else 1/(1-rate).

    Each image draws its own. Without a key all factors are 1 (Huang et al., "Deep Networks with
    Stochastic Depth", 2016).

    Shapes: -> (B,).
    """
    if key is None or rate == 0:
        return jnp.ones(batch)
    return jax.random.bernoulli(key, 1 - rate, (batch,)) / (1 - rate)


class LearnedResidual(nn.Module):
    """Learned residual coefficients (LRC): x, y -> a*x + b*k*y with scalars a and b.

    a starts at 1; b starts at `branch_init`, which is 1 as published and less in very deep models.
    k is each image's drop-path factor.

    Shapes: x and y (B, N, C), k (B,) -> (B, N, C). The sum is computed in at least float32 and
    returned in x's dtype (SReT section 3.3, "learnable residual connection").
    """

    branch_init: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array, k: jax.Array) -> jax.Array:
        a = self.param("skip", nn.initializers.ones, ())
        b = self.param("branch", nn.initializers.constant(self.branch_init), ())
        return (a * x + b * k[:, None, None] * y).astype(x.dtype)


class Stem(nn.Module):
    """Three times [3x3 convolution, stride 2 -> BatchNorm -> ReLU], channels 3 -> C/2 -> C -> C.

    Shapes: (B, H, W, 3) -> (B, H/8, W/8, C). BatchNorm has eps 1e-5 and keeps
    running <- 0.9 * running + 0.1 * batch, over the global batch. On CPUs (see `Linear.mesh`) the
    kernels' gradients are computed by `flat_convolution`.
    """

    channels: int
    dtype: DTypeLike = jnp.float32
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i, features in enumerate((self.channels // 2, self.channels, self.channels), start=1):
            init = fan_in_uniform(9 * x.shape[-1])
            x = nn.Conv(
                features,
                (3, 3),
                strides=2,
                padding=1,
                dtype=self.dtype,
                kernel_init=init,
                bias_init=init,
                conv_general_dilated=flat_convolution if on_cpus(self.mesh) else None,
                name=f"conv{i}",
            )(x)  # (B, H/2^i, W/2^i, features)
            x = nn.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                epsilon=1e-5,
                dtype=self.dtype,
                name=f"bn{i}",
            )(x)
            x = nn.relu(x)
        return x


class Pooling(nn.Module):
    """3x3 convolution, stride 2, padding 1, with as many feature groups as input channels.

    out[y, x, m*c + k] = bias[m*c + k] + sum_ij in[2y+i-1, 2x+j-1, c] * kernel[i, j, c, k],
    where m = features / C.

    Shapes: (B, H, W, C) -> (B, H/2, W/2, features).

    Attributes:
      features: output channels.
      mesh: the devices over which images are split. Each device gets the whole kernel: if fsdp
        split its channels, XLA:TPU would gather all images in order to split their gradient too.
      dtype: dtype of activations.
    """

    features: int
    mesh: Mesh | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        multiplier = self.features // channels
        init = fan_in_uniform(9)
        kernel = self.param("kernel", init, (3, 3, channels, multiplier))
        if self.mesh is not None:
            whole = NamedSharding(self.mesh, PartitionSpec())
            kernel = jax.lax.with_sharding_constraint(kernel, whole)
        bias = self.param("bias", init, (self.features,))

        out = grouped_convolution(x, kernel) + bias.reshape(1, 1, 1, -1)
        return out.astype(self.dtype)
