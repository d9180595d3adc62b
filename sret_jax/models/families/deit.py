"""DeiT (Touvron et al., "Training data-efficient image transformers & distillation", ICML 2021).

Unusual in it: one stage of full resolution, ViT's; a class token is classified. The distilled form
has a second token with a head of its own, which learns from a teacher.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from sret_jax.models import torch_layout as torch
from sret_jax.models.checks import check_divisible, check_positive
from sret_jax.models.class_tokens import ClassTokenModel, token, with_prefix
from sret_jax.models.layers.convolution import PatchEmbedding
from sret_jax.models.layers.linear import NORMAL, Initialisation
from sret_jax.models.model import Shapes, Stage, Variant
from sret_jax.models.position import resize_position
from sret_jax.models.torch_layout import Entry

# The arrays that show the image size, here and in torch, and an axis of patch_size.
_OF_SIZE = (
    ("params/pos_embed", "params/patch_embed/kernel", 0),
    ("pos_embed", "patch_embed.proj.weight", 3),
)


def _variant(size: str, heads: int, top1: float, top1_at_384: float | None = None) -> Variant:
    distilled = size.endswith("distilled")
    settings = dict(blocks=(12,), heads=(heads,), dim=64, mlp_ratio=4.0, patch_size=16)
    settings |= dict(distilled=distilled, drop_path_rate=0.1)
    name = f"deit_{size}_patch16"
    larger = Variant({}, top1_at_384, 1.0, f"{name}_384.fb_in1k")
    others = {384: larger} if top1_at_384 else {}
    return Variant(settings, top1, 0.9, f"{name}_224.fb_in1k", other_sizes=others)


class DeiT(ClassTokenModel, kw_only=True):  # type: ignore[call-arg]
    """Patches -> class token first -> + position -> blocks -> LN -> linear map of the class token.

    With N = (image_size / patch_size)^2 patches, prefix p = 1 (2 if distilled) and C = heads * dim:

        x = [class; (distillation;) W_e patches] + position  (B, p + N, C), the blocks of
        `AttentionBlock`, y = LN(x), logits = W_h y_0 + b_h (distilled: and W_d y_1 + b_d).

    Linear maps start from N(0, 0.02^2) with zero biases, and so do tokens and positions; the patch
    embedding starts as torch's convolutions do. Source: github.com/facebookresearch/deit.

    Attributes:
      patch_size: side of a patch in pixels.
    """

    # Top-1: the README of the source, which shows 0.875 of the shorter side in evaluation. The test
    # crops are those that timm gives with the same weights.
    variants: ClassVar[Mapping[str, Variant]] = {
        "deit_tiny": _variant("tiny", 3, 72.2),
        "deit_small": _variant("small", 6, 79.9),
        "deit_base": _variant("base", 12, 81.8, 82.9),
        "deit_tiny_distilled": _variant("tiny_distilled", 3, 74.5),
        "deit_small_distilled": _variant("small_distilled", 6, 81.2),
        "deit_base_distilled": _variant("base_distilled", 12, 83.4, 85.2),
    }
    # ViT (Dosovitskiy et al., ICLR 2021) is the same function.
    in_timm: ClassVar[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
        f"vit_{size}_patch16_{side}": (f"deit_{size}", {})
        for size in ("tiny", "small", "base")
        for side in (224, 384)
    }
    start: ClassVar[Initialisation] = NORMAL

    patch_size: int = 16

    @property
    def stages(self) -> tuple[Stage, ...]:
        """See `Model`."""
        width = self.widths[0]
        stage = Stage(
            side=self.image_size // self.patch_size,
            width=width,
            hidden=int(self.mlp_ratio * width),
            heads=self.heads[0],
            groups=self.groups[0],
            prefix=self.prefix,
        )
        return (stage,)

    def embed(self, images: jax.Array, train: bool) -> jax.Array:
        """See `Model`."""
        del train
        (stage,) = self.stages
        embedding = PatchEmbedding(stage.width, self.patch_size, self.layers, name="patch_embed")
        x = embedding(images).reshape(images.shape[0], stage.side**2, stage.width)  # (B, N, C)
        names = ("cls_token", "dist_token")[: self.prefix]
        tokens = jnp.concatenate([token(self, name, 1, stage.width) for name in names], axis=1)
        x = with_prefix(tokens, x)  # (B, p + N, C)
        position = self.param("pos_embed", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        return x + position.astype(self.dtype)

    def check_sizes(self) -> None:
        """See `Model`."""
        super().check_sizes()
        check_positive(self, ("patch_size",))
        check_divisible(self.image_size, self.patch_size)
        if len(self.blocks) != 1:
            raise ValueError(f"blocks={self.blocks} has {len(self.blocks)} stages; DeiT has one")

    def resized(self, params: Any, old: Self) -> Any:
        """See `Model`: the positions of the image's tokens are resized."""
        position = params["pos_embed"]
        of_tokens, of_image = position[:, : self.prefix], position[:, self.prefix :]
        grid = of_image.reshape(1, old.stages[0].side, old.stages[0].side, -1)
        grid = resize_position(grid, self.stages[0].side)
        resized = jnp.concatenate([of_tokens, grid.reshape(1, -1, grid.shape[-1])], axis=1)
        return {**params, "pos_embed": resized}

    @classmethod
    def sizes(cls, shapes: Shapes) -> dict[str, Any]:
        """See `Model`."""
        sizes = super().sizes(shapes)
        prefix = 2 if "params/dist_token" in shapes or "dist_token" in shapes else 1
        for position, patches, axis in _OF_SIZE:
            if len(shapes.get(position, ())) == 3 and len(shapes.get(patches, ())) == 4:
                side = math.isqrt(max(0, shapes[position][1] - prefix))
                sizes["image_size"] = side * shapes[patches][axis]
        return sizes

    def torch_entries(self) -> Iterator[Entry]:
        """See `Model`: timm's names, which are DeiT's own; `blocks` lists all applications."""
        self.check_published()
        for name in ("cls_token", "dist_token")[: self.prefix]:
            yield Entry(name, ("params", name), torch.SAME)
        yield Entry("pos_embed", ("params", "pos_embed"), torch.SAME)
        yield from torch.affine("patch_embed.proj", ("params", "patch_embed"), torch.CONV)
        for b in range(self.blocks[0]):
            for loop in range(self.loops):
                place = ("params", f"stage0_block{b}", "block")
                yield from torch.attention_block(f"blocks.{b * self.loops + loop}", place)
        yield from torch.norm("norm", ("params", "norm"))
        for name in self.classifiers:
            yield from torch.linear(name, ("params", name))
