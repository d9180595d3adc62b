"""The residual MLP (SReT section 3.2): half of the shared block, and the non-linear layer."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sret_jax.models.fused_mlp import Weights, fused_mlp
from sret_jax.models.kernels import Kernels
from sret_jax.models.layers import MLP, LearnedResidual, layer_norm


class ResidualMLP(nn.Module):
    """x <- a*x + b*k*MLP(LN(x)), with residual coefficients a, b and the drop path's factors k.

    Shapes: x (B, N, C), k (B,) -> (B, N, C). The non-linear layer (NLL) has k = 1.
    """

    hidden: int
    branch_init: float = 1.0
    kernels: Kernels = Kernels()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, k: jax.Array) -> jax.Array:
        if self.kernels.mlp == "xla" or self.is_initializing():
            y = layer_norm(dtype=self.dtype, name="norm")(x)
            y = MLP(self.hidden, dtype=self.dtype, name="mlp")(y)
            return LearnedResidual(self.branch_init, name="residual")(x, y, k)

        unfused = self.clone(kernels=Kernels(mlp="xla"), parent=None)

        def plain(x: jax.Array, k: jax.Array, params: dict) -> jax.Array:
            out: Any = unfused.apply({"params": params}, x, k)
            return out

        def kernel(x: jax.Array, k: jax.Array, params: dict, interpret: bool) -> jax.Array:
            return fused_mlp(x, k, _weights(params), interpret)

        run = self.kernels.choose(self.kernels.mlp, kernel, plain, images=2)
        return run(x, k, self.variables["params"])


def _weights(params: dict) -> Weights:
    norm, fc1, fc2 = params["norm"], params["mlp"]["fc1"], params["mlp"]["fc2"]
    residual = params["residual"]
    return Weights(
        coefficients=jnp.stack([residual["skip"], residual["branch"]])[None],
        scale=norm["scale"][None],
        shift=norm["bias"][None],
        w1=fc1["kernel"],
        b1=fc1["bias"][None],
        w2=fc2["kernel"],
        b2=fc2["bias"][None],
    )
