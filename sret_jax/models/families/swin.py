"""Swin Transformer (Liu et al., ICCV 2021): attention inside windows of a pyramid of grids.

Unusual in it: tokens attend inside windows of 7x7, which every second block shifts by half a
window; each head has a learned bias for every offset between two tokens, so there is no position
array; four tokens merge into one between stages; the norm precedes the mean over tokens.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from sret_jax.models import torch_layout as torch
from sret_jax.models.checks import check_divisible, check_length, check_positive
from sret_jax.models.layers.blocks import PreNormBlock
from sret_jax.models.layers.convolution import PatchEmbedding
from sret_jax.models.layers.linear import NORMAL, Initialisation, LayerSettings
from sret_jax.models.layers.windows import WindowAttention, Windows, resize_bias_table, window_cycle
from sret_jax.models.model import Model, Shapes, Stage, Unit, Variant
from sret_jax.models.read_out import MeanReadOut
from sret_jax.models.torch_layout import Entry

PATCH = 4
TABLE = "relative_position_bias_table"
_MERGING = re.compile(r"^layers\.(\d+)\.(?=downsample\.)")


def _variant(size: str, blocks: int, heads: int, drop_path_rate: float, top1: float) -> Variant:
    """A variant whose third stage has that many blocks, and whose first has that many heads."""
    settings = dict(
        blocks=(2, 2, blocks, 2),
        heads=(heads, 2 * heads, 4 * heads, 8 * heads),
        drop_path_rate=drop_path_rate,
    )
    hub = f"swin_{size}_patch4_window7_224.ms_in1k"
    return Variant(settings, top1, 0.9, hub)


AT_384 = Variant(dict(window=12), 84.5, 1.0, "swin_base_patch4_window12_384.ms_in1k")


class Swin(Model, kw_only=True):  # type: ignore[call-arg]
    """Patches -> linear -> LN -> recursive blocks, merging between stages -> LN -> mean -> linear.

    Stage s runs at stride 4 * 2^s with width heads[s] * dim. Its windows are as large as `window`
    or, if that is smaller, as its grid. Grids of odd size are padded before tokens merge, and those
    that the window does not divide before they are cut, as in timm.

    Block b of a stage shifts its windows if b is odd, as published. A recursive block shifts them
    in every second application: the first application is as published, the next has the other
    shift, and so on alternately (ours; a block that is applied with one shift alone would never
    look across the borders of its windows).

    Source: Liu et al. and github.com/microsoft/Swin-Transformer, whose README states top1, of
    training on ImageNet-1K alone; the paper has 81.3 for Swin-T and 83.0 for Swin-S. The test
    crops are those that timm gives with the same weights.

    Attributes:
      heads: attention heads of each stage.
      dim: channels per head; a stage's width is heads * dim.
      window: height and width of a window in tokens.
      mlp_ratio: hidden width of the MLPs divided by the stage's width.
    """

    variants: ClassVar[Mapping[str, Variant]] = {
        "swin_tiny": _variant("tiny", 6, 3, 0.2, 81.2),
        "swin_small": _variant("small", 18, 3, 0.3, 83.2),
        "swin_base": _variant("base", 18, 4, 0.5, 83.5)._replace(other_sizes={384: AT_384}),
    }
    start: ClassVar[Initialisation] = NORMAL
    epsilon: ClassVar[float] = 1e-5
    resizable: ClassVar[frozenset[str]] = frozenset({"image_size", "window"})
    why_unsliced: ClassVar[str] = "its blocks attend inside windows, not over all tokens"
    torch_ignored: ClassVar[tuple[str, ...]] = (
        *Model.torch_ignored,
        "relative_position_index",
        "attn_mask",
    )

    heads: tuple[int, ...]
    dim: int = 32
    window: int = 7
    mlp_ratio: float = 4.0

    @property
    def stages(self) -> tuple[Stage, ...]:
        """See `Model`."""
        stages, side = [], self.image_size // PATCH
        for heads in self.heads:
            width = heads * self.dim
            hidden = int(self.mlp_ratio * width)
            window = min(self.window, side)
            stages.append(Stage(side, width, hidden, heads=heads, window=window))
            side = -(-side // 2)
        return tuple(stages)

    def embed(self, images: jax.Array, train: bool) -> jax.Array:
        """See `Model`."""
        del train
        x = PatchEmbedding(self.stages[0].width, PATCH, self.layers, name="patch_embed")(images)
        x = self.layers.layer_norm(name="patch_norm")(x)  # (B, H/4, W/4, C)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def unit(self, stage: int, block: int, train: bool) -> Unit:
        """See `Model`."""
        del train
        sizes = self.stages[stage]
        swin_block = SwinBlock(heads=sizes.heads, **self.block_settings(stage, block))
        return Unit(swin_block, turns=window_cycle(sizes.side, sizes.window, block))

    def join(self, x: jax.Array, stage: int) -> jax.Array:
        """See `Model`: merges tokens."""
        side, width = self.stages[stage - 1].side, self.stages[stage].width
        x = x.reshape(x.shape[0], side, side, -1)
        x = PatchMerging(width, self.layers, name=f"pool{stage}")(x)
        return x.reshape(x.shape[0], -1, width)

    def read_out(self) -> nn.Module:
        """See `Model`."""
        grid = (self.stages[-1].side,) * 2
        return MeanReadOut(self.num_classes, self.layers, grid, norm_first=True, parent=None)

    def check_sizes(self) -> None:
        """See `Model`."""
        check_length(self, ("heads",))
        check_positive(self, ("heads", "dim", "window"))
        check_divisible(self.image_size, PATCH, "the side of a patch")
        if int(self.mlp_ratio * min(self.heads) * self.dim) < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} leaves no hidden unit; raise it")

    def resized(self, params: Any, old: Self) -> Any:
        """See `Model`: the tables of position biases are resized where the windows differ."""
        resized = dict(params)
        for s, stage in enumerate(self.stages):
            for b in range(self.blocks[s]):
                name = f"stage{s}_block{b}"
                block = params[name]["block"]
                table = resize_bias_table(block["attn"]["position_bias"], stage.window)
                attention = {**block["attn"], "position_bias": table}
                resized[name] = {**params[name], "block": {**block, "attn": attention}}
        return resized

    @classmethod
    def sizes(cls, shapes: Shapes) -> dict[str, Any]:
        """See `Model`: the tables of position biases show the windows.

        The image size is the smallest, of the multiples of the last stage's stride, that has such
        windows: grids that are larger than the window cannot be told apart.
        """
        head = shapes.get("head.fc.bias", ())
        sizes = {"num_classes": head[0]} if len(head) == 1 else super().sizes(shapes)
        table = re.compile(
            rf"(?:params/stage|layers\.)(\d+)(?:_block0/block/attn/position_bias"
            rf"|\.blocks\.0\.attn\.{TABLE})"
        )
        found = ((table.fullmatch(name), shape) for name, shape in shapes.items())
        rows = {int(m[1]): shape[0] for m, shape in found if m and len(shape) == 2}
        if rows:
            windows = [(math.isqrt(rows[s]) + 1) // 2 for s in sorted(rows)]
            sizes["window"] = windows[0]
            sizes["image_size"] = windows[-1] * PATCH * 2 ** (len(windows) - 1)
        return sizes

    @classmethod
    def renamed(cls, arrays: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `Model`: Microsoft's stages end with a merging of tokens, timm's begin with it."""
        if "layers.0.downsample.reduction.weight" not in arrays:
            return arrays
        later = {name: _MERGING.sub(lambda m: f"layers.{int(m[1]) + 1}.", name) for name in arrays}
        return {
            re.sub(r"^head\.", "head.fc.", later[name]): array for name, array in arrays.items()
        }

    def torch_entries(self) -> Iterator[Entry]:
        """See `Model`: the names of timm, where each application of a block is a block."""
        self.check_published()
        shifts = any(stage.window < stage.side for stage in self.stages)
        if shifts and self.loops % 2 == 0 and max(self.blocks) > 1:
            raise ValueError(
                f"a Swin with loops={self.loops} has no published names: its blocks begin with "
                "alternate shifts, so two successive applications would have the same shift, "
                "which a published Swin has not"
            )
        yield from torch.affine("patch_embed.proj", ("params", "patch_embed"), torch.CONV)
        yield from torch.norm("patch_embed.norm", ("params", "patch_norm"))
        for s, blocks in enumerate(self.blocks):
            if s > 0:
                name, pool = f"layers.{s}.downsample", ("params", f"pool{s}")
                yield from torch.norm(f"{name}.norm", (*pool, "norm"))
                kernel = (*pool, "reduction", "kernel")
                yield Entry(f"{name}.reduction.weight", kernel, torch.LINEAR)
            for b in range(blocks):
                path = ("params", f"stage{s}_block{b}", "block")
                for loop in range(self.loops):
                    name = f"layers.{s}.blocks.{b * self.loops + loop}"
                    yield from torch.attention_block(name, path)
                    table = (*path, "attn", "position_bias")
                    yield Entry(f"{name}.attn.{TABLE}", table, torch.SAME)
        yield from torch.norm("norm", ("params", "norm"))
        yield from torch.linear("head.fc", ("params", "head"))


class SwinBlock(PreNormBlock, kw_only=True):  # type: ignore[call-arg]
    """x <- a*x + b*DropPath(WindowAttention(LN(x)));  x <- c*x + d*DropPath(MLP(LN(x))).

    See `PreNormBlock`. `turn` says how the N tokens are cut into windows.

    Attributes:
      heads: attention heads.
    """

    sum_name: ClassVar[str] = "attn_residual"

    heads: int

    def mix(self, x: jax.Array, *, turn: Windows) -> jax.Array:  # type: ignore[override]
        """See `PreNormBlock`."""
        return WindowAttention(self.heads, self.layers, name="attn")(x, turn)


class PatchMerging(nn.Module):
    """Joins the channels of 2x2 tokens, column by column -> LN -> linear without a bias.

    Shapes: (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), features). Odd grids are padded with zeros.
    """

    features: int
    layers: LayerSettings = LayerSettings()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, side, _, channels = x.shape
        if odd := side % 2:
            x = jnp.pad(x, ((0, 0), (0, odd), (0, odd), (0, 0)))
        half = (side + odd) // 2
        x = x.reshape(batch, half, 2, half, 2, channels).transpose(0, 1, 3, 4, 2, 5)
        x = x.reshape(batch, half, half, 4 * channels)
        x = self.layers.layer_norm(name="norm")(x)
        return self.layers.linear(self.features, 4 * channels, bias=False, name="reduction")(x)
