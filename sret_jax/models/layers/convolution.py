"""The convolutions of stems and of pooling, in forms that XLA compiles to fast code.

Those of SReT are 3x3 with stride 2 and padding 1. Its stem's is

    y[b, r, s, f] = sum_ijc x[b, 2r+i-1, 2s+j-1, c] * kernel[i, j, c, f],  i, j = 0 .. 2.

With n = (b, r, s) on one axis, row i of the kernel's gradient is one product of (3C, n) and (n, F):

    d_kernel[i, j, c, f] = sum_n x[b, 2r+i-1, 2s+j-1, c] * dy[n, f].

XLA:CPU instead compiles this gradient as a convolution whose window is as large as the image: it
transposes both operands and uses one core.
"""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from sret_jax.models.layers.linear import (
    FAN_IN,
    Initialisation,
    LayerSettings,
    fan_in_uniform,
    on_cpus,
)


class PatchEmbedding(nn.Module):
    """A linear map of each p x p patch: a convolution with stride p.

    On CPUs (see `Linear.mesh`) it is one matrix product, whose gradient takes a fifth to a half of
    the time. On a TPU that would move six times the bytes.

    Shapes: (B, H, W, C) -> (B, H/p, W/p, features).

    Attributes:
      features: output channels.
      patch: p, the side of a patch.
      layers: settings of all layers.
      start: initialisation. By default weights and bias are drawn from U(-1/(p sqrt(C)),
        1/(p sqrt(C))).
    """

    features: int
    patch: int
    layers: LayerSettings = LayerSettings()
    start: Initialisation = FAN_IN

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        p, channels = self.patch, x.shape[-1]
        fan_in = p * p * channels
        kernel = self.param("kernel", self.start.kernel(fan_in), (p, p, channels, self.features))
        bias = self.param("bias", self.start.bias(fan_in), (self.features,))
        x, kernel, bias = (a.astype(self.layers.dtype) for a in (x, kernel, bias))
        on_cpu = on_cpus(self.layers.kernels.mesh)
        out = (patch_product if on_cpu else patch_convolution)(x, kernel)
        return out + bias.reshape(1, 1, 1, -1)


def patch_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves with stride p: (B, H, W, C), (p, p, C, F) -> (B, H/p, W/p, F)."""
    axes = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, kernel.shape[:2], padding="VALID", dimension_numbers=axes
    )


def patch_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`patch_convolution` as one matrix product of all patches."""
    (batch, height, width, channels), p = x.shape, kernel.shape[0]
    x = x.reshape(batch, height // p, p, width // p, p, channels).swapaxes(2, 3)
    out = x.reshape(-1, p * p * channels) @ kernel.reshape(p * p * channels, -1)
    return out.reshape(batch, height // p, width // p, -1)


class Pooling(nn.Module):
    """A 3x3 convolution, stride 2, padding 1, with as many feature groups as input channels.

    out[y, x, m*c + k] = bias[m*c + k] + sum_ij in[2y+i-1, 2x+j-1, c] * kernel[i, j, c, k],
    where m = features / C.

    Shapes: (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), features).

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


def flat_convolution(x: jax.Array, kernel: jax.Array, *settings: Any, **named: Any) -> jax.Array:
    """`conv_general_dilated` whose kernel gradient is a matrix product over all positions at once.

    Shapes: x (B, H, W, C), kernel (3, 3, C, F) -> (B, H/2, W/2, F). The other arguments are those
    that `nn.Conv` passes for stride 2 and padding 1.
    """
    y = jax.lax.conv_general_dilated(x, jax.lax.stop_gradient(kernel), *settings, **named)
    return _learn(y, x, kernel)


@jax.custom_vjp
def _learn(y: jax.Array, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns y. x gets its gradient through y; the kernel's gradient is computed here."""
    del x, kernel
    return y


def _learn_forward(y: jax.Array, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    del kernel
    return y, x


def _learn_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, None, jax.Array]:
    return dy, None, _kernel_gradient(x, dy).astype(dy.dtype)


_learn.defvjp(_learn_forward, _learn_backward)


def _kernel_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """(B, H, W, C) and (B, H/2, W/2, F) -> (3, 3, C, F), in at least float32."""
    _, height, width, features = dy.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = jnp.concatenate([x[:, :, j : j + 2 * width : 2] for j in range(3)], -1)  # (B, H+2, W/2, 3C)
    rows = [x[:, i : i + 2 * height : 2].reshape(-1, x.shape[-1]) for i in range(3)]  # (n, 3C)
    dy = dy.reshape(-1, features)  # (n, F)
    wide = jnp.promote_types(dy.dtype, jnp.float32)
    products = [jnp.einsum("nc,nf->cf", r, dy, preferred_element_type=wide) for r in rows]
    return jnp.stack(products).reshape(3, 3, -1, features)


def grouped_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """y[b, r, s, m*c + k] = sum_ij x[b, 2r+i-1, 2s+j-1, c] * kernel[i, j, c, k], k = 0 .. m-1.

    Shapes: x (B, H, W, C), kernel (3, 3, C, m) -> (B, ceil(H/2), ceil(W/2), m*C), in at least
    float32.
    """
    return jax.lax.platform_dependent(x, kernel, tpu=_grouped, default=_shifted)


def _grouped(x: jax.Array, kernel: jax.Array) -> jax.Array:
    out = jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype).reshape(3, 3, 1, -1),
        window_strides=(2, 2),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )
    return out.astype(jnp.promote_types(x.dtype, jnp.float32))


def _shifted(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution as shifted multiply-adds, since XLA:CPU's grouped gradient is slow.

    On a TPU this form copies its terms between memory layouts: for sret_s's first pooling it
    moved 27 MB per image, forward and backward; the convolution moves 6 MB.
    """
    height, width = (x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))[..., None]  # (B, H+2, W+2, C, 1)
    out = jnp.zeros((), jnp.promote_types(x.dtype, jnp.float32))
    for i, j in itertools.product(range(3), range(3)):
        shifted = x[:, i : i + 2 * height : 2, j : j + 2 * width : 2]
        out += shifted * kernel[None, None, None, i, j]  # (B, H/2, W/2, C, m)
    return out.reshape(*out.shape[:3], -1)
