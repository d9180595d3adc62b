"""The pre-norm transformer block: attention, then an MLP."""

import flax.linen as nn
import jax

from sret_jax.models.layers.attention import PLAIN, SlicedAttention, Slices
from sret_jax.models.layers.linear import LayerSettings
from sret_jax.models.layers.residual import ResidualMLP, ResidualSum, drop_path_factors


class AttentionBlock(nn.Module):
    """The block F of SReT, DeiT and PiT.

    x <- c1*x + c2*DropPath(Attention(LN(x)));  x <- c3*x + c4*DropPath(MLP(LN(x))).

    Shapes: (B, prefix + N, C) -> (B, prefix + N, C). `permutation` is (N,). `drop_path` is a key
    that seeds both drop paths; without it nothing is dropped.

    Attributes:
      heads: attention heads.
      hidden: hidden units of the MLP.
      drop_path_rate: probability that an image's branch is dropped in training.
      prefix: number of tokens, such as a class token, before those of the image.
      layers: settings of all layers.
    """

    heads: int
    hidden: int
    drop_path_rate: float = 0.0
    prefix: int = 0
    layers: LayerSettings = LayerSettings()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        turn: Slices = PLAIN,
        permutation: jax.Array | None = None,
        drop_path: jax.Array | None = None,
    ) -> jax.Array:
        keys = (None, None) if drop_path is None else jax.random.split(drop_path)
        k1, k2 = (drop_path_factors(key, self.drop_path_rate, x.shape[0]) for key in keys)

        y = self.layers.layer_norm(name="norm1")(x)
        attention = SlicedAttention(self.heads, self.layers, self.prefix, name="attn")
        y = attention(y, groups=turn.groups, permutation=permutation)
        x = ResidualSum(self.layers, name="attn_residual")(x, y, k1)

        mlp = ResidualMLP(self.hidden, self.layers, norm="norm2", residual="mlp_residual")
        nn.share_scope(self, mlp)  # the MLP's parameters lie beside the attention's
        return mlp(x, k2)
