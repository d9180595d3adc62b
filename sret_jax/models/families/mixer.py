"""MLP-Mixer (Tolstikhin et al., NeurIPS 2021): MLPs over tokens and MLPs over channels.

Unusual in it: there is no attention and no position array. One MLP mixes the tokens of each
channel, so its weights depend on the number of tokens: the image size of trained weights cannot be
changed. The head starts at zero.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax

from sret_jax.models import torch_layout as torch
from sret_jax.models.checks import check_divisible, check_positive
from sret_jax.models.layers.blocks import PreNormBlock
from sret_jax.models.layers.convolution import PatchEmbedding
from sret_jax.models.layers.linear import MLP, Initialisation
from sret_jax.models.model import Model, Shapes, Stage, Unit, Variant
from sret_jax.models.read_out import MeanReadOut
from sret_jax.models.torch_layout import Entry

# timm's: Glorot-uniform weights and biases near 0 in the blocks.
GLOROT = Initialisation(
    lambda _: nn.initializers.xavier_uniform(), lambda _: nn.initializers.normal(1e-6)
)
LECUN = Initialisation(lambda _: nn.initializers.lecun_normal(), lambda _: nn.initializers.zeros)
ZEROS = Initialisation(lambda _: nn.initializers.zeros, lambda _: nn.initializers.zeros)


def _variant(blocks: int, width: int, top1: float | None, **names: Any) -> Variant:
    return Variant(dict(blocks=(blocks,), width=width, drop_path_rate=0.1), top1, **names)


class Mixer(Model, kw_only=True):  # type: ignore[call-arg]
    """Patches -> linear -> blocks -> LN -> mean over tokens -> linear.

    The paper lets the drop-path rate rise linearly from 0 to 0.1, timm gives all blocks the same.
    Here it rises linearly over the blocks.

    Source: Tolstikhin et al., tables 1 and 2; timm's `mixer_s16_224` and `mixer_b16_224`. top1 is
    that of training on ImageNet alone, quoted from memory; the paper has no Mixer-S/16 for it. The
    weights on the hub were trained on ImageNet-21k first.

    Attributes:
      width: channels C of a token.
      patch_size: side of a patch in pixels.
      token_ratio: hidden width of the MLPs over tokens divided by `width`.
      mlp_ratio: hidden width of the MLPs over channels divided by `width`.
    """

    variants: ClassVar[Mapping[str, Variant]] = {
        "mixer_s16": _variant(8, 512, None, timm="mixer_s16_224"),
        "mixer_b16": _variant(12, 768, 76.44, hub="mixer_b16_224.goog_in21k_ft_in1k"),
    }
    start: ClassVar[Initialisation] = GLOROT
    why_unsliced: ClassVar[str] = "its blocks mix tokens by an MLP, without attention"

    width: int = 512
    patch_size: int = 16
    token_ratio: float = 0.5
    mlp_ratio: float = 4.0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """See `Model`: there is one."""
        return (
            Stage(
                side=self.image_size // self.patch_size,
                width=self.width,
                hidden=int(self.mlp_ratio * self.width),
                token_hidden=int(self.token_ratio * self.width),
            ),
        )

    def embed(self, images: jax.Array, train: bool) -> jax.Array:
        """See `Model`."""
        del train
        embedding = PatchEmbedding(self.width, self.patch_size, self.layers, LECUN, name="stem")
        return embedding(images).reshape(images.shape[0], -1, self.width)

    def unit(self, stage: int, block: int, train: bool) -> Unit:
        """See `Model`."""
        del train
        hidden = self.stages[stage].token_hidden
        return Unit(MixerBlock(token_hidden=hidden, **self.block_settings(stage, block)))

    def read_out(self) -> nn.Module:
        """See `Model`."""
        return MeanReadOut(
            self.num_classes,
            self.layers,
            (self.stages[0].side ** 2,),
            norm_first=True,
            start=ZEROS,
            parent=None,
        )

    def check_sizes(self) -> None:
        """See `Model`."""
        check_positive(self, ("width", "patch_size"))
        check_divisible(self.image_size, self.patch_size)
        if len(self.blocks) != 1:
            raise ValueError(f"blocks={self.blocks} must have one entry: a Mixer has one stage")
        for ratio in ("token_ratio", "mlp_ratio"):
            if int(getattr(self, ratio) * self.width) < 1:
                raise ValueError(f"{ratio}={getattr(self, ratio)} leaves no hidden unit; raise it")

    def resized(self, params: Any, old: Self) -> Any:
        """See `Model`."""
        raise ValueError(
            f"the MLPs over tokens are made for the {old.stages[0].side ** 2} tokens of "
            f"{old.image_size} pixels, so a Mixer cannot change its image size to "
            f"{self.image_size}; leave image_size at {old.image_size}"
        )

    @classmethod
    def sizes(cls, shapes: Shapes) -> dict[str, Any]:
        """See `Model`: the MLPs over tokens show the number of tokens."""
        sizes = super().sizes(shapes)
        stem = shapes.get("params/stem/kernel", shapes.get("stem.proj.weight", ()))
        fc2 = shapes.get(  # its bias has one number per token
            "params/stage0_block0/block/mlp_tokens/fc2/bias",
            shapes.get("blocks.0.mlp_tokens.fc2.bias", ()),
        )
        if len(stem) == 4 and len(fc2) == 1:
            patch = stem[0] if "params/stem/kernel" in shapes else stem[2]  # HWIO, OIHW
            sizes["image_size"] = math.isqrt(fc2[0]) * patch
        return sizes

    def torch_entries(self) -> Iterator[Entry]:
        """See `Model`: the names of timm, where each application of a block is a block."""
        self.check_published()
        yield from torch.affine("stem.proj", ("params", "stem"), torch.CONV)
        for b in range(self.blocks[0]):
            path = ("params", f"stage0_block{b}", "block")
            for loop in range(self.loops):
                name = f"blocks.{b * self.loops + loop}"
                yield from torch.norm(f"{name}.norm1", (*path, "norm1"))
                yield from torch.norm(f"{name}.norm2", (*path, "norm2"))
                for of_torch, ours in (("mlp_tokens", "mlp_tokens"), ("mlp_channels", "mlp")):
                    for layer in ("fc1", "fc2"):
                        yield from torch.linear(f"{name}.{of_torch}.{layer}", (*path, ours, layer))
        yield from torch.norm("norm", ("params", "norm"))
        yield from torch.linear("head", ("params", "head"))


class MixerBlock(PreNormBlock, kw_only=True):  # type: ignore[call-arg]
    """x <- a*x + b*DropPath(MLP(LN(x)^T)^T);  x <- c*x + d*DropPath(MLP(LN(x))).

    The first MLP maps the N tokens of each channel, the second the C channels of each token. See
    `PreNormBlock`.

    Attributes:
      token_hidden: hidden units of the MLP over tokens.
    """

    sum_name: ClassVar[str] = "token_residual"

    token_hidden: int

    def mix(self, x: jax.Array) -> jax.Array:
        """See `PreNormBlock`."""
        mlp = MLP(self.token_hidden, self.layers, name="mlp_tokens")
        return mlp(x.swapaxes(1, 2)).swapaxes(1, 2)  # (B, C, N) -> (B, N, C)
