"""Pre-norm blocks: a residual branch that mixes tokens, then the residual MLP over channels."""

from typing import Any, ClassVar

import flax.linen as nn
import jax

from sret_jax.models.layers.attention import PLAIN, SlicedAttention, Slices
from sret_jax.models.layers.linear import LayerSettings
from sret_jax.models.layers.residual import ResidualMLP, ResidualSum, drop_path_factors


class PreNormBlock(nn.Module, kw_only=True):  # type: ignore[call-arg]
    """x <- a*x + b*DropPath(mix(LN(x)));  x <- c*x + d*DropPath(MLP(LN(x))).

    A subclass defines `mix`. The coefficients a, b, c, d are 1 where residual sums are plain.

    Shapes: (B, N, C) -> (B, N, C). `drop_path` is a key that seeds both drop paths; without it
    nothing is dropped. `mix` gets all other keyword arguments.

    Attributes:
      hidden: hidden units of the MLP.
      drop_path_rate: probability that an image's branch is dropped in training.
      layers: settings of all layers.
    """

    sum_name: ClassVar[str] = "mix_residual"  # parameter name of a and b

    hidden: int
    drop_path_rate: float = 0.0
    layers: LayerSettings = LayerSettings()

    def mix(self, x: jax.Array) -> jax.Array:
        """The first branch: (B, N, C) -> (B, N, C). A subclass may take keyword arguments."""
        raise NotImplementedError

    @nn.compact
    def __call__(
        self, x: jax.Array, *, drop_path: jax.Array | None = None, **given: Any
    ) -> jax.Array:
        keys = (None, None) if drop_path is None else jax.random.split(drop_path)
        k1, k2 = (drop_path_factors(key, self.drop_path_rate, x.shape[0]) for key in keys)

        y = self.mix(self.layers.layer_norm(name="norm1")(x), **given)
        x = ResidualSum(self.layers, name=self.sum_name)(x, y, k1)

        mlp = ResidualMLP(self.hidden, self.layers, norm="norm2", residual="mlp_residual")
        nn.share_scope(self, mlp)  # the MLP's parameters lie beside those of the first branch
        return mlp(x, k2)


class AttentionBlock(PreNormBlock, kw_only=True):  # type: ignore[call-arg]
    """The block F of SReT, DeiT and PiT; `turn` says how attention is sliced.

    x <- c1*x + c2*DropPath(Attention(LN(x)));  x <- c3*x + c4*DropPath(MLP(LN(x))).

    See `PreNormBlock`. Shapes: (B, prefix + N, C) -> (B, prefix + N, C). `permutation` is (N,).

    Attributes:
      heads: attention heads.
      prefix: number of tokens, such as a class token, before those of the image.
    """

    sum_name: ClassVar[str] = "attn_residual"

    heads: int
    prefix: int = 0

    def mix(
        self, x: jax.Array, *, turn: Slices = PLAIN, permutation: jax.Array | None = None
    ) -> jax.Array:
        """See `PreNormBlock`."""
        attention = SlicedAttention(self.heads, self.layers, self.prefix, name="attn")
        return attention(x, groups=turn.groups, permutation=permutation)
