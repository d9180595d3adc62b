"""SReT as one would write it in PyTorch: the reference for our speed.

Its arrays have the published names, so `load_state_dict` accepts the result of `sret_jax.to_torch`.
"""

import jax
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sret_jax.models.families.sret import STEM_STRIDE, SReT
from sret_jax.models.layers.attention import fixed_permutation


class Coefficient(nn.Module):
    """A learned scalar c: x -> c*x."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias * x


class MLP(nn.Module):
    """x -> W2 GELU(W1 x + b1) + b2."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SlicedAttention(nn.Module):
    """softmax(Q_G K_G^T / sqrt(d)) V_G in each of equal slices G of the permuted tokens.

    Shapes: (B, N, C) -> (B, N, C).
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, groups: int, permutation: Tensor | None) -> Tensor:
        batch, tokens, channels = x.shape
        if permutation is not None:
            x = x[:, permutation]
        qkv = self.qkv(x).reshape(batch, groups, tokens // groups, 3, self.heads, -1)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # (B, G, heads, N/G, d)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        out = (weights @ v).transpose(2, 3).reshape(batch, tokens, channels)
        if permutation is not None:
            out = out[:, permutation.argsort()]
        return self.proj(out)


class SharedBlock(nn.Module):
    """x <- c1*x + c2*DropPath(Attention(LN(x)));  x <- c3*x + c4*DropPath(MLP(LN(x)))."""

    def __init__(self, channels: int, heads: int, hidden: int, drop_path_rate: float):
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(channels, SReT.epsilon)
        self.attn = SlicedAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels, SReT.epsilon)
        self.mlp = MLP(channels, hidden)
        self.coefficient1, self.coefficient2 = Coefficient(), Coefficient()
        self.coefficient3, self.coefficient4 = Coefficient(), Coefficient()

    def forward(self, x: Tensor, groups: int, permutation: Tensor | None) -> Tensor:
        y = self.attn(self.norm1(x), groups, permutation)
        x = self.coefficient1(x) + self.coefficient2(self._drop_path(y))
        y = self.mlp(self.norm2(x))
        return self.coefficient3(x) + self.coefficient4(self._drop_path(y))

    def _drop_path(self, y: Tensor) -> Tensor:
        if not self.training or self.drop_path_rate == 0:
            return y
        keep = 1 - self.drop_path_rate
        return y * (y.new_empty(len(y), 1, 1).bernoulli_(keep) / keep)


class NLL(nn.Module):
    """The non-linear layer, x <- d1*x + d2*MLP(LN(x))."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, SReT.epsilon)
        self.mlp = MLP(channels, hidden)
        self.coefficient1, self.coefficient2 = Coefficient(), Coefficient()

    def forward(self, x: Tensor) -> Tensor:
        return self.coefficient1(x) + self.coefficient2(self.mlp(self.norm1(x)))


class Stage(nn.Module):
    """Applies each shared block `loops` times in a row; after each time its own NLL follows.

    Shapes: (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, model: SReT, stage: int):
        super().__init__()
        self.loops, self.groups = model.loops, model.groups[stage]
        channels = model.widths[stage]
        first = sum(model.blocks[:stage]) * model.loops
        total = sum(model.blocks) * model.loops
        self.blocks = nn.ModuleList()
        for b in range(model.blocks[stage]):
            shared = SharedBlock(
                channels,
                model.heads[stage],
                int(model.mlp_ratio * channels),
                model.drop_path_rate * (first + b) / total,
            )
            for _ in range(model.loops):
                self.blocks.extend([shared, NLL(channels, int(model.nll_ratio * channels))])
        tokens = (model.image_size // (STEM_STRIDE * 2**stage)) ** 2
        fixed = torch.from_numpy(fixed_permutation(jax.random.key(0), tokens))
        self.fixed: Tensor
        self.register_buffer("fixed", fixed, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.flatten(2).transpose(1, 2)  # (B, N, C)
        for i, (block, nll) in enumerate(zip(self.blocks[::2], self.blocks[1::2], strict=True)):
            element = i % self.loops % len(self.groups)
            groups = self.groups[element]
            permutation = self._permutation() if element > 0 and groups > 1 else None
            x = nll(block(x, groups, permutation))
        return x.transpose(1, 2).reshape(shape)

    def _permutation(self) -> Tensor:
        return torch.randperm(len(self.fixed)) if self.training else self.fixed


class Stem(nn.Module):
    """Three times [3x3 convolution, stride 2 -> BatchNorm -> ReLU]: (B, 3, H, W) -> /8."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels // 2, 3, 2, 1)
        self.conv2 = nn.Conv2d(channels // 2, channels, 3, 2, 1)
        self.conv3 = nn.Conv2d(channels, channels, 3, 2, 1)
        self.bn1, self.bn2, self.bn3 = map(nn.BatchNorm2d, (channels // 2, channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)))


class Pooling(nn.Module):
    """A 3x3 convolution of stride 2 with as many groups as input channels."""

    def __init__(self, channels: int, features: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, features, 3, 2, 1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class TorchTwin(nn.Module):
    """The same function as `model`, which may be modified but has published names.

    Shapes: normalised images (B, 3, image_size, image_size) -> logits (B, num_classes).
    """

    def __init__(self, model: SReT):
        super().__init__()
        widths, side = model.widths, model.image_size // STEM_STRIDE
        self.patch_embed = Stem(widths[0])
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, widths[0], side, side))
        self.transformers = nn.ModuleList(Stage(model, s) for s in range(len(widths)))
        self.pools = nn.ModuleList(map(Pooling, widths[:-1], widths[1:]))
        self.norm = nn.LayerNorm(widths[-1], SReT.epsilon)
        self.head = nn.Linear(widths[-1], model.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images) + self.pos_embed  # (B, C, H/8, W/8)
        for s, stage in enumerate(self.transformers):
            x = stage(self.pools[s - 1](x) if s else x)
        return self.head(self.norm(x.mean((2, 3))))
