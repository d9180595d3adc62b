"""Residual branches: drop path, residual sums and the residual MLP."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sret_jax.models.kernels.fused_mlp import Weights, can_hold, fused_mlp
from sret_jax.models.layers.linear import MLP, LayerSettings

RESIDUALS = ("learned", "plain")


def drop_path_factors(key: jax.Array | None, rate: float, batch: int) -> jax.Array:
    """The factor that stochastic depth gives a branch: 0 with probability `rate`, else 1/(1-rate).

    Each image draws its own. Without a key all factors are 1 (Huang et al., "Deep Networks with
    Stochastic Depth", 2016).

    Shapes: -> (B,).
    """
    if key is None or rate == 0:
        return jnp.ones(batch)
    return jax.random.bernoulli(key, 1 - rate, (batch,)) / (1 - rate)


class ResidualSum(nn.Module):
    """x, y -> a*x + b*k*y, with the drop-path factor k of each image.

    Learned residual coefficients (SReT section 3.3) are the scalars a, which starts at 1, and b,
    which starts at `branch_init`: 1 as published, less in very deep models. The plain sum has no
    parameters: a = b = 1.

    Shapes: x and y (B, N, C), k (B,) -> (B, N, C). The sum is computed in at least float32 and
    returned in x's dtype.
    """

    layers: LayerSettings = LayerSettings()

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array, k: jax.Array) -> jax.Array:
        k = k[:, None, None]
        if self.layers.residual == "plain":
            return (x + k * y).astype(x.dtype)
        a = self.param("skip", nn.initializers.ones, ())
        b = self.param("branch", nn.initializers.constant(self.layers.branch_init), ())
        return (a * x + b * k * y).astype(x.dtype)


class ResidualMLP(nn.Module):
    """x <- a*x + b*k*MLP(LN(x)): residual coefficients a, b and each image's drop-path factor k.

    It is half of a transformer block, and SReT's non-linear layer (section 3.2).

    Shapes: x (B, N, C), k (B,) -> (B, N, C). The non-linear layer (NLL) has k = 1.

    Attributes:
      hidden: hidden units of the MLP.
      layers: settings of all layers; its kernels decide whether a fused kernel computes this one.
      activation: that of the MLP; see `MLP`.
      norm, residual: parameter names of the LayerNorm and of the residual coefficients.
    """

    hidden: int
    layers: LayerSettings = LayerSettings()
    activation: str = "gelu"
    norm: str = "norm"
    residual: str = "residual"

    @nn.compact
    def __call__(self, x: jax.Array, k: jax.Array) -> jax.Array:
        kernels = self.layers.kernels
        if kernels.mlp == "xla" or self.is_initializing():
            y = self.layers.layer_norm(name=self.norm)(x)
            y = MLP(self.hidden, self.layers, self.activation, name="mlp")(y)
            return ResidualSum(self.layers, name=self.residual)(x, y, k)

        names = (self.norm, "mlp", self.residual)
        params: dict = {
            name: self.get_variable("params", name)
            for name in names
            if self.has_variable("params", name)
        }
        run = kernels.choose(kernels.mlp, self._fused, self._unfused, images=2)
        return run(x, k, params)

    def _unfused(self, x: jax.Array, k: jax.Array, params: dict) -> jax.Array:
        kernels = dataclasses.replace(self.layers.kernels, mlp="xla")
        layers = dataclasses.replace(self.layers, kernels=kernels)
        out: Any = self.clone(layers=layers, parent=None).apply({"params": params}, x, k)
        return out

    def _fused(self, x: jax.Array, k: jax.Array, params: dict, interpret: bool) -> jax.Array:
        if self.activation != "gelu" or not can_hold(x, self.hidden):
            return self._unfused(x, k, params)
        plain = {"skip": jnp.ones(()), "branch": jnp.ones(())}
        norm, residual = params[self.norm], params.get(self.residual, plain)
        fc1, fc2 = params["mlp"]["fc1"], params["mlp"]["fc2"]
        weights = Weights(
            coefficients=jnp.stack([residual["skip"], residual["branch"]])[None],
            scale=norm["scale"][None],
            shift=norm["bias"][None],
            w1=fc1["kernel"],
            b1=fc1["bias"][None],
            w2=fc2["kernel"],
            b2=fc2["bias"][None],
        )
        return fused_mlp(x, k, weights, self.layers.epsilon, interpret)
