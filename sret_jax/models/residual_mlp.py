"""The residual MLP (SReT section 3.2): half of the shared block, and the non-linear layer."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sret_jax.models.kernels.choice import Kernels
from sret_jax.models.kernels.fused_mlp import Weights, can_hold, fused_mlp
from sret_jax.models.layers import MLP, LearnedResidual, layer_norm


class ResidualMLP(nn.Module):
    """x <- a*x + b*k*MLP(LN(x)): residual coefficients a, b and each image's drop-path factor k.

    Shapes: x (B, N, C), k (B,) -> (B, N, C). The non-linear layer (NLL) has k = 1.

    Attributes:
      hidden: hidden units of the MLP.
      branch_init: initial value of b.
      kernels: decides whether a fused kernel computes the layer.
      dtype: dtype of activations and matrix products.
      norm, residual: parameter names of the LayerNorm and of the residual coefficients.
    """

    hidden: int
    branch_init: float = 1.0
    kernels: Kernels = Kernels()
    dtype: DTypeLike = jnp.float32
    norm: str = "norm"
    residual: str = "residual"

    @nn.compact
    def __call__(self, x: jax.Array, k: jax.Array) -> jax.Array:
        if self.kernels.mlp == "xla" or self.is_initializing():
            y = layer_norm(dtype=self.dtype, name=self.norm)(x)
            y = MLP(self.hidden, self.dtype, self.kernels.mesh, name="mlp")(y)
            return LearnedResidual(self.branch_init, name=self.residual)(x, y, k)

        names = (self.norm, "mlp", self.residual)
        params: dict = {name: self.get_variable("params", name) for name in names}
        run = self.kernels.choose(self.kernels.mlp, self._fused, self._unfused, images=2)
        return run(x, k, params)

    def _unfused(self, x: jax.Array, k: jax.Array, params: dict) -> jax.Array:
        layer = self.clone(kernels=dataclasses.replace(self.kernels, mlp="xla"), parent=None)
        out: Any = layer.apply({"params": params}, x, k)
        return out

    def _fused(self, x: jax.Array, k: jax.Array, params: dict, interpret: bool) -> jax.Array:
        if not can_hold(x, self.hidden):
            return self._unfused(x, k, params)
        norm, residual = params[self.norm], params[self.residual]
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
        return fused_mlp(x, k, weights, interpret)
