"""Models that classify by tokens of their own: a class token, and a distillation token (DeiT)."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from sret_jax.models.read_out import TokenReadOut
from sret_jax.models.sliced_model import SlicedModel


class ClassTokenModel(SlicedModel, kw_only=True):  # type: ignore[call-arg]
    """A `SlicedModel` with one or two tokens before those of the image, each with a head.

    In training with a teacher, the head of the class token learns from labels and that of the
    distillation token from the teacher (Touvron et al., 2021, section 4).

    Attributes:
      distilled: whether there is a distillation token.
    """

    pool_in_timm: ClassVar[str] = "token"

    distilled: bool = False

    @property
    def prefix(self) -> int:
        """The number of tokens before those of the image."""
        return 2 if self.distilled else 1

    @property
    def classifiers(self) -> tuple[str, ...]:
        """See `Model`."""
        return ("head", "head_dist")[: self.prefix]

    def read_out(self) -> nn.Module:
        """See `Model`."""
        return TokenReadOut(self.classifiers, self.num_classes, self.layers, parent=None)


def token(module: nn.Module, name: str, count: int, width: int) -> jax.Array:
    """The parameter of `count` tokens, drawn from N(0, 0.02^2): (1, count, width)."""
    drawn: jax.Array = module.param(name, nn.initializers.normal(0.02), (1, count, width))
    return drawn


def with_prefix(prefix: jax.Array, x: jax.Array) -> jax.Array:
    """Puts tokens before those of each image: (1, p, C), (B, N, C) -> (B, p + N, C)."""
    prefix = jnp.broadcast_to(prefix, (x.shape[0], *prefix.shape[1:]))
    return jnp.concatenate([prefix.astype(x.dtype), x], axis=1)
