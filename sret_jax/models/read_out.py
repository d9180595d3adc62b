"""Read-outs: the final norm, pooling and classification heads of a model.

They are modules of their own, so that they can read the state after any application of the last
block: an exit. Their parameters are "norm" and the heads, beside the blocks' in the model's tree.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from sret_jax.models.layers.linear import Initialisation, LayerSettings


class TokenReadOut(nn.Module):
    """LN -> one linear head for each of the first tokens.

    Shapes: (B, N, C) -> per head (B, num_classes), in at least float32.

    Attributes:
      heads: parameter names of the heads; head i reads token i.
      num_classes: width of the logits.
      layers: settings of all layers.
    """

    heads: tuple[str, ...]
    num_classes: int
    layers: LayerSettings

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        wide = self.layers.wide()
        x = wide.layer_norm(name="norm")(x[:, : len(self.heads)])
        return tuple(
            wide.linear(self.num_classes, x.shape[-1], name=name)(x[:, token])
            for token, name in enumerate(self.heads)
        )


class MeanReadOut(nn.Module):
    """Mean over all tokens -> LN -> one linear head; or LN first, then the mean.

    Shapes: (B, N, C) -> one head (B, num_classes), in at least float32.

    Attributes:
      num_classes: width of the logits.
      layers: settings of all layers.
      grid: the axes that the N tokens are averaged over: (H, W), or (N,).
      norm_first: whether LN comes before the mean.
      start: initialisation of the head; None: that of all layers.
    """

    num_classes: int
    layers: LayerSettings
    grid: tuple[int, ...]
    norm_first: bool = False
    start: Initialisation | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        wide, channels = self.layers.wide(), x.shape[-1]
        norm = wide.layer_norm(name="norm")
        x = x.reshape(x.shape[0], *self.grid, channels)
        x = norm(x) if self.norm_first else x
        x = jnp.mean(x, axis=tuple(range(1, x.ndim - 1)), dtype=wide.dtype)  # (B, C)
        x = x if self.norm_first else norm(x)
        head = dataclasses.replace(wide, start=self.start or wide.start)
        return (head.linear(self.num_classes, channels, name="head")(x),)


def mean_of_heads(logits: tuple[jax.Array, ...]) -> jax.Array:
    """The logits of a model with these logits of each head: (..., K) each -> (..., K)."""
    total = logits[0]
    for of_head in logits[1:]:
        total += of_head
    return total / len(logits) if len(logits) > 1 else total
