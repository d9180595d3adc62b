"""How arrays are named and laid out in torch: the entries that families list."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

Path = tuple[str, ...]  # of a Flax leaf, such as ("params", "head", "kernel")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The order of an array's axes in torch and in Flax, as two inverse functions."""

    to_flax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda w: w, lambda w: w)
LINEAR = Layout(lambda w: w.T, lambda w: w.T)  # (out, in) <-> (in, out)
CONV = Layout(lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))  # OIHW <-> HWIO
SCALAR = Layout(lambda w: w.reshape(()), lambda w: w.reshape(1))
GRID = Layout(lambda w: w.transpose(0, 2, 3, 1), lambda w: w.transpose(0, 3, 1, 2))  # NCHW <-> NHWC


def grouped_conv(channels: int) -> Layout:
    """A convolution with as many feature groups as input channels C: (C*m, 1, 3, 3)."""
    return Layout(
        lambda w: w.reshape(channels, -1, 3, 3).transpose(2, 3, 0, 1),  # (3, 3, C, m)
        lambda w: w.transpose(2, 3, 0, 1).reshape(-1, 1, 3, 3),
    )


@dataclasses.dataclass(frozen=True)
class Entry:
    """One torch array: its name, and the Flax leaf (and row, for NLLs) that it corresponds to."""

    torch_name: str
    path: Path
    layout: Layout
    row: int | None = None


def affine(torch: str, path: Path, layout: Layout, scale: str = "kernel") -> Iterator[Entry]:
    """The entries of a layer with a weight, which Flax names `scale`, and a bias."""
    yield Entry(f"{torch}.weight", (*path, scale), layout)
    yield Entry(f"{torch}.bias", (*path, "bias"), SAME)


def norm(torch: str, path: Path) -> Iterator[Entry]:
    """The entries of a LayerNorm or BatchNorm."""
    return affine(torch, path, SAME, "scale")


def linear(torch: str, path: Path) -> Iterator[Entry]:
    """The entries of a linear map."""
    return affine(torch, path, LINEAR)


def attention_block(torch: str, path: Path) -> Iterator[Entry]:
    """The entries of an `AttentionBlock` without its residual coefficients, which timm has not."""
    yield from norm(f"{torch}.norm1", (*path, "norm1"))
    yield from linear(f"{torch}.attn.qkv", (*path, "attn", "qkv"))
    yield from linear(f"{torch}.attn.proj", (*path, "attn", "proj"))
    yield from norm(f"{torch}.norm2", (*path, "norm2"))
    yield from linear(f"{torch}.mlp.fc1", (*path, "mlp", "fc1"))
    yield from linear(f"{torch}.mlp.fc2", (*path, "mlp", "fc2"))
