"""The Sliced Recursive Transformer (Shen, Liu, Xing, ECCV 2022), on PiT's pyramid of stages.

Unusual in it: every block is applied twice (internal recursion), attends inside slices of the
tokens in its first loops, and is followed by a non-linear layer (NLL) of its own in each loop;
all residual sums have learned coefficients; there is no class token.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax

from sret_jax.models import torch_layout as torch
from sret_jax.models.checks import check_divisible
from sret_jax.models.layers.convolution import Pooling, flat_convolution
from sret_jax.models.layers.linear import LayerSettings, fan_in_uniform, on_cpus
from sret_jax.models.model import Shapes, Stage, Variant
from sret_jax.models.position import resize_position
from sret_jax.models.read_out import MeanReadOut
from sret_jax.models.sliced_model import SlicedModel, check_pooling
from sret_jax.models.torch_layout import Entry, Path

STEM_STRIDE = 8  # of the published models
STEM_STRIDES = (8, 4, 2)
SLICED = ((8, 2), (4, 1), (1, 1))


def _variant(drop_path_rate: float, top1: float, **settings: Any) -> Variant:
    same = dict(blocks=(2, 5, 3), loops=2, groups=SLICED)
    return Variant(dict(**same, **settings, drop_path_rate=drop_path_rate), top1)


class SReT(SlicedModel, kw_only=True):  # type: ignore[call-arg]
    """Stem -> + position -> recursive blocks, pooling between stages -> mean -> LN -> linear.

    Stage s runs at stride stem_stride * 2^s with width heads[s] * dim. Block b of stage s has the
    drop-path rate drop_path_rate * (first_s + b) / total in all its loops, where first_s is the
    number of applications in earlier stages and total the number of all applications.

    Source: SReT sections 3 and 4, github.com/szq0214/SReT. The published models have nll_every=1.

    Attributes:
      stem_stride: 8 as published; 4 and 2 keep more tokens of small images (ours).
    """

    # SReT tables 3, 5 and 6.
    variants: ClassVar[Mapping[str, Variant]] = {
        "sret_t": _variant(0.1, 76.0, heads=(2, 4, 8), dim=32, mlp_ratio=3.6, nll_ratio=1.0),
        "sret_lt": _variant(0.1, 76.7, heads=(2, 4, 8), dim=32, mlp_ratio=4.0, nll_ratio=1.0),
        "sret_s": _variant(0.2, 81.9, heads=(3, 6, 12), dim=42, mlp_ratio=3.0, nll_ratio=2.0),
    }

    loops: int = 2
    nll_ratio: float = 1.0
    residual: str = "learned"
    stem_stride: int = STEM_STRIDE

    @property
    def stages(self) -> tuple[Stage, ...]:
        """See `Model`."""
        return tuple(
            Stage(
                side=self.image_size // (self.stem_stride * 2**s),
                width=width,
                hidden=int(self.mlp_ratio * width),
                heads=heads,
                groups=groups,
            )
            for s, (width, heads, groups) in enumerate(
                zip(self.widths, self.heads, self.groups, strict=True)
            )
        )

    def embed(self, images: jax.Array, train: bool) -> jax.Array:
        """See `Model`."""
        # Full rematerialisation recomputes the stem too.
        stem = nn.remat(Stem, static_argnums=(2,)) if self.remat == "full" else Stem
        x = stem(self.widths[0], self.layers, self.stem_stride, name="stem")(images, train)
        position = self.param("pos_embed", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x = x + position.astype(self.dtype)  # (B, H/stride, W/stride, C)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def join(self, x: jax.Array, stage: int) -> jax.Array:
        """See `Model`: pools the grid."""
        side, width = self.stages[stage - 1].side, self.widths[stage]
        x = x.reshape(x.shape[0], side, side, -1)
        x = Pooling(width, self.mesh, self.dtype, name=f"pool{stage}")(x)
        return x.reshape(x.shape[0], -1, width)

    def read_out(self) -> nn.Module:
        """See `Model`."""
        grid = (self.stages[-1].side,) * 2
        return MeanReadOut(self.num_classes, self.layers, grid, parent=None)

    def drop_path_of(self, stage: int, block: int) -> float:
        """See `SReT`."""
        first, total = (sum(self.blocks[:s]) * self.loops for s in (stage, len(self.blocks)))
        return self.drop_path_rate * (first + block) / total

    def check_sizes(self) -> None:
        """See `Model`."""
        super().check_sizes()
        if self.stem_stride not in STEM_STRIDES:
            raise ValueError(f"stem_stride={self.stem_stride} must be one of {STEM_STRIDES}")
        check_divisible(self.image_size, self.stem_stride * 2 ** (len(self.blocks) - 1))
        if self.widths[0] % 2:
            raise ValueError(
                f"the stem width heads[0]*dim = {self.heads[0]}*{self.dim} = {self.widths[0]} is "
                "odd, but the stem starts at half of it; make heads[0] or dim even"
            )
        check_pooling(self)

    def resized(self, params: Any, old: Self) -> Any:
        """See `Model`: the position array is resized."""
        side = self.image_size // self.stem_stride
        return {**params, "pos_embed": resize_position(params["pos_embed"], side)}

    @classmethod
    def sizes(cls, shapes: Shapes) -> dict[str, Any]:
        """See `Model`."""
        sizes = super().sizes(shapes)
        if len(position := shapes.get("params/pos_embed", ())) == 4:  # (1, H, W, C)
            sizes["image_size"] = position[1] * STEM_STRIDE
        if len(position := shapes.get("pos_embed", ())) == 4:  # (1, C, H, W)
            sizes["image_size"] = position[3] * STEM_STRIDE
        return sizes

    @classmethod
    def nlls(cls, shapes: Shapes) -> int:
        """See `Model`."""
        layer = re.compile(r"transformers\.0\.blocks\.(\d+)\.")  # F, NLL, F, NLL, ...
        of_torch = {m[1] for name in shapes if (m := layer.match(name))}
        return super().nlls(shapes) + len(of_torch) // 2

    def torch_entries(self) -> Iterator[Entry]:
        """See `Model`.

        The published state dict lists applications rather than blocks:
        `transformers.{stage}.blocks.{j}` alternates F, NLL, F, NLL, ..., so loop l of block b is
        j = 2*(b*loops + l) and its NLL is j + 1. A block that loops share is contained once per
        loop.
        """
        if self.stem_stride != STEM_STRIDE or self.nll_activation != "gelu":
            raise ValueError(
                f"a model with stem_stride={self.stem_stride} and nll_activation="
                f"{self.nll_activation!r} has no published names, which belong to stem_stride="
                f"{STEM_STRIDE} and nll_activation='gelu'"
            )
        plain = self.residual == "plain"
        if self.nll_every > 1 or self.nll_ratio == 0 or plain or self.adapters:
            raise ValueError(
                f"a model with nll_every={self.nll_every}, nll_ratio={self.nll_ratio:g}, "
                f"adapters={self.adapters} and {self.residual} residual sums has no published "
                "names, in which an NLL follows every application, every residual sum has "
                "coefficients, and there are no adapters"
            )
        yield Entry("pos_embed", ("params", "pos_embed"), torch.GRID)
        for i in (1, 2, 3):
            conv, norm = f"conv{i}", f"bn{i}"
            yield from torch.affine(f"patch_embed.{conv}", ("params", "stem", conv), torch.CONV)
            yield from torch.norm(f"patch_embed.{norm}", ("params", "stem", norm))
            for of_torch, ours in (("running_mean", "mean"), ("running_var", "var")):
                path = ("batch_stats", "stem", norm, ours)
                yield Entry(f"patch_embed.{norm}.{of_torch}", path, torch.SAME)
        for s, blocks in enumerate(self.blocks):
            if s > 0:
                pool = torch.grouped_conv(self.widths[s - 1])
                yield from torch.affine(f"pools.{s - 1}.conv", ("params", f"pool{s}"), pool)
            for b in range(blocks):
                place = ("params", f"stage{s}_block{b}")
                for loop in range(self.loops):
                    j = 2 * (b * self.loops + loop)
                    yield from _shared_block(f"transformers.{s}.blocks.{j}", (*place, "block"))
                    yield from _nll(f"transformers.{s}.blocks.{j + 1}", (*place, "nll"), loop)
        yield from torch.norm("norm", ("params", "norm"))
        yield from torch.linear("head", ("params", "head"))


class Stem(nn.Module):
    """Three times [3x3 convolution, stride 2 -> BatchNorm -> ReLU], channels 3 -> C/2 -> C -> C.

    With a smaller `stride` in all, the last convolutions have stride 1.

    Shapes: (B, H, W, 3) -> (B, H/stride, W/stride, C). BatchNorm has eps 1e-5 and keeps
    running <- 0.9 * running + 0.1 * batch, over the global batch. On CPUs (see `Linear.mesh`) the
    gradients of kernels with stride 2 are computed by `flat_convolution`.
    """

    channels: int
    layers: LayerSettings = LayerSettings()
    stride: int = STEM_STRIDE

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        on_cpu = on_cpus(self.layers.kernels.mesh)
        for i, features in enumerate((self.channels // 2, self.channels, self.channels), start=1):
            init = fan_in_uniform(9 * x.shape[-1])
            stride = 2 if 2**i <= self.stride else 1
            x = nn.Conv(
                features,
                (3, 3),
                strides=stride,
                padding=1,
                dtype=self.layers.dtype,
                kernel_init=init,
                bias_init=init,
                conv_general_dilated=flat_convolution if on_cpu and stride == 2 else None,
                name=f"conv{i}",
            )(x)  # (B, H', W', features), H' = H/min(2^i, stride)
            x = nn.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                epsilon=1e-5,
                dtype=self.layers.dtype,
                name=f"bn{i}",
            )(x)
            x = nn.relu(x)
        return x


def _shared_block(name: str, path: Path) -> Iterator[Entry]:
    yield from torch.attention_block(name, path)
    yield from _residual(name, 1, (*path, "attn_residual"))
    yield from _residual(name, 3, (*path, "mlp_residual"))


def _nll(name: str, path: Path, loop: int) -> Iterator[Entry]:
    entries = (
        *torch.norm(f"{name}.norm1", (*path, "norm")),
        *torch.linear(f"{name}.mlp.fc1", (*path, "mlp", "fc1")),
        *torch.linear(f"{name}.mlp.fc2", (*path, "mlp", "fc2")),
        *_residual(name, 1, (*path, "residual")),
    )
    yield from (dataclasses.replace(entry, row=loop) for entry in entries)


def _residual(name: str, first: int, path: Path) -> Iterator[Entry]:
    yield Entry(f"{name}.coefficient{first}.bias", (*path, "skip"), torch.SCALAR)
    yield Entry(f"{name}.coefficient{first + 1}.bias", (*path, "branch"), torch.SCALAR)
