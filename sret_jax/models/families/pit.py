"""The Pooling-based Vision Transformer (Heo et al., ICCV 2021): a pyramid with class tokens.

Unusual in it: patches overlap by half; between stages a strided convolution pools the grid, and a
linear map widens the class tokens, which belong to no place of the grid; sides may be odd.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax

from sret_jax.models import torch_layout as torch
from sret_jax.models.checks import check_positive
from sret_jax.models.class_tokens import ClassTokenModel, token, with_prefix
from sret_jax.models.layers.convolution import Pooling
from sret_jax.models.layers.linear import LayerSettings, fan_in_uniform
from sret_jax.models.model import Shapes, Stage, Variant
from sret_jax.models.position import resize_position
from sret_jax.models.sliced_model import check_pooling
from sret_jax.models.torch_layout import Entry

_AUTHORS_POOL = re.compile(r"^pools\.(\d+)\.")


def _variants(name: str, top1: float, distilled_top1: float, **settings: Any) -> dict[str, Variant]:
    settings["drop_path_rate"] = 0.1
    distilled = dict(**settings, distilled=True)
    return {
        f"pit_{name}": Variant(settings, top1, 0.9, f"pit_{name}_224.in1k"),
        f"pit_{name}_distilled": Variant(
            distilled, distilled_top1, 0.9, f"pit_{name}_distilled_224.in1k"
        ),
    }


class PiT(ClassTokenModel, kw_only=True):  # type: ignore[call-arg]
    """Patches -> + position -> blocks, pooling between stages -> LN and linear of the class token.

    Stage s has p class tokens (1, or 2 if distilled) and a grid of S_s x S_s tokens, of width
    C_s = heads[s] * dim. For images of side H,

        S_0 = H / stride - 1,  stride = patch_size / 2;  S_s = ceil(S_{s-1} / 2);
        grid = Conv(images) + position  (B, S_0, S_0, C_0);  tokens  (B, p, C_0);
        before stage s > 0: grid <- Pooling(grid), tokens <- W tokens + b  (to width C_s);
        the blocks of `AttentionBlock` on [tokens; grid]  (B, p + S_s^2, C_s);
        y = LN(tokens), logits = W_h y_0 + b_h, and W_d y_1 + b_d if distilled.

    Linear maps, convolutions and their biases start from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), tokens
    and positions from N(0, 0.02^2). Drop-path rates rise evenly from 0 at the first block to
    `drop_path_rate` at the last, as in timm; the authors' code stops one step below it.

    Source: Heo et al., "Rethinking Spatial Dimensions of Vision Transformers", table 1;
    github.com/naver-ai/pit, whose README lists the accuracies and trains by DeiT's recipe.

    Attributes:
      patch_size: side of a patch in pixels, even.
    """

    variants: ClassVar[Mapping[str, Variant]] = {
        **_variants("ti", 73.0, 74.6, blocks=(2, 6, 4), heads=(2, 4, 8), dim=32),
        **_variants("xs", 78.1, 79.1, blocks=(2, 6, 4), heads=(2, 4, 8), dim=48),
        **_variants("s", 80.9, 81.9, blocks=(2, 6, 4), heads=(3, 6, 12), dim=48),
        **_variants("b", 82.0, 84.0, blocks=(3, 6, 4), heads=(4, 8, 16), dim=64, patch_size=14),
    }

    patch_size: int = 16

    @property
    def stride(self) -> int:
        """Distance of neighbouring patches in pixels."""
        return self.patch_size // 2

    @property
    def stages(self) -> tuple[Stage, ...]:
        """See `Model`."""
        side, stages = self.image_size // self.stride - 1, []
        for width, heads, groups in zip(self.widths, self.heads, self.groups, strict=True):
            hidden = int(self.mlp_ratio * width)
            stages.append(Stage(side, width, hidden, heads, groups, self.prefix))
            side = -(-side // 2)
        return tuple(stages)

    def embed(self, images: jax.Array, train: bool) -> jax.Array:
        """See `Model`: the class tokens, then those of the grid."""
        del train
        first = self.stages[0]
        init = fan_in_uniform(self.patch_size**2 * images.shape[-1])
        grid = nn.Conv(
            first.width,
            (self.patch_size, self.patch_size),
            strides=self.stride,
            padding="VALID",
            dtype=self.dtype,
            kernel_init=init,
            bias_init=init,
            name="patch_embed",
        )(images)
        normal = nn.initializers.normal(0.02)
        position = self.param("pos_embed", normal, (1, *grid.shape[1:]))
        grid = grid + position.astype(self.dtype)  # (B, S, S, C)
        tokens = token(self, "cls_token", first.prefix, first.width)  # (1, p, C)
        return with_prefix(tokens, grid.reshape(grid.shape[0], -1, first.width))  # (B, p + S*S, C)

    def join(self, x: jax.Array, stage: int) -> jax.Array:
        """See `Model`: pools the grid, and widens the class tokens."""
        side, width = self.stages[stage - 1].side, self.stages[stage].width
        tokens, grid = x[:, : self.prefix], x[:, self.prefix :]
        grid = grid.reshape(grid.shape[0], side, side, -1)
        grid, tokens = TokenPooling(width, self.layers, name=f"pool{stage}")(grid, tokens)
        return with_prefix(tokens, grid.reshape(grid.shape[0], -1, width))

    def check_sizes(self) -> None:
        """See `Model`."""
        super().check_sizes()
        check_positive(self, ("patch_size",))
        size, patch, stride = self.image_size, self.patch_size, self.stride
        if patch % 2:
            raise ValueError(
                f"patch_size={patch} is odd, but patches overlap by half; use {patch + 1}"
            )
        if size < patch or size % stride:
            below = size // stride * stride
            nearest = [n for n in (below, below + stride) if n >= patch] or [patch]
            raise ValueError(
                f"image_size={size} is not a whole number of patches of {patch} pixels at stride "
                f"{stride}; use {' or '.join(map(str, nearest))}"
            )
        check_pooling(self)

    def resized(self, params: Any, old: Self) -> Any:
        """See `Model`: the position array is resized."""
        position = resize_position(params["pos_embed"], self.stages[0].side)
        return {**params, "pos_embed": position}

    @classmethod
    def sizes(cls, shapes: Shapes) -> dict[str, Any]:
        """See `Model`."""
        sizes = super().sizes(shapes)
        position = shapes.get("pos_embed", ())  # (1, C, S, S)
        kernel = shapes.get("patch_embed.conv.weight", ())  # (C, 3, patch, patch)
        if "params/pos_embed" in shapes:  # (1, S, S, C), (patch, patch, 3, C)
            position = shapes["params/pos_embed"][::-1]
            kernel = shapes.get("params/patch_embed/kernel", ())[::-1]
        if len(position) == len(kernel) == 4:
            sizes["image_size"] = (position[2] + 1) * (kernel[2] // 2)
        return sizes

    @classmethod
    def renamed(cls, arrays: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `Model`: what timm calls "transformers.1.pool" is "pools.0" in the authors' files."""
        if "pools.0.fc.weight" not in arrays:
            return arrays
        return {
            _AUTHORS_POOL.sub(lambda m: f"transformers.{int(m[1]) + 1}.pool.", name): array
            for name, array in arrays.items()
        }

    def torch_entries(self) -> Iterator[Entry]:
        """See `Model`: the names of timm, where each application of a block is a block."""
        self.check_published()
        yield Entry("pos_embed", ("params", "pos_embed"), torch.GRID)
        yield Entry("cls_token", ("params", "cls_token"), torch.SAME)
        yield from torch.affine("patch_embed.conv", ("params", "patch_embed"), torch.CONV)
        for s, blocks in enumerate(self.blocks):
            name = f"transformers.{s}"
            if s > 0:
                grouped = torch.grouped_conv(self.widths[s - 1])
                yield from torch.affine(
                    f"{name}.pool.conv", ("params", f"pool{s}", "conv"), grouped
                )
                yield from torch.linear(f"{name}.pool.fc", ("params", f"pool{s}", "fc"))
            for i in range(blocks * self.loops):
                path = ("params", f"stage{s}_block{i // self.loops}", "block")
                yield from torch.attention_block(f"{name}.blocks.{i}", path)
        yield from torch.norm("norm", ("params", "norm"))
        for head in self.classifiers:
            yield from torch.linear(head, ("params", head))


class TokenPooling(nn.Module):
    """Pools the grid by a strided convolution and maps the class tokens to the same width.

    Shapes: (B, H, W, C) and (B, T, C) -> (B, ceil(H/2), ceil(W/2), features), (B, T, features).
    """

    features: int
    layers: LayerSettings = LayerSettings()

    @nn.compact
    def __call__(self, grid: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        mesh, dtype = self.layers.kernels.mesh, self.layers.dtype
        grid = Pooling(self.features, mesh, dtype, name="conv")(grid)
        return grid, self.layers.linear(self.features, tokens.shape[-1], name="fc")(tokens)
