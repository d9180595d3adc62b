"""Windows of a grid of tokens, and attention inside them (Liu et al., "Swin Transformer", 2021)."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sret_jax.models.kernels.fused_windows import can_hold, fused_windows
from sret_jax.models.layers.attention import attention, joined, split
from sret_jax.models.layers.linear import LayerSettings

MASKED = -100.0  # added to the scores of tokens that do not see each other, as published


@dataclasses.dataclass(frozen=True)
class Windows:
    """How one application of a block cuts its grid of tokens into square windows.

    The grid is rolled by -shift along both axes, padded with zeros at its end to a multiple of
    the windows' size, and cut. After a roll, the last windows of each axis contain tokens from
    opposite borders of the image, which do not attend to each other.

    Attributes:
      side: height and width of the grid.
      size: height and width of a window, at most `side`.
      shift: by how many tokens the windows lie further right and further down.
    """

    side: int
    size: int
    shift: int = 0

    @property
    def padded(self) -> int:
        """Height and width of the padded grid."""
        return -(-self.side // self.size) * self.size

    @property
    def count(self) -> int:
        """The number of windows."""
        return (self.padded // self.size) ** 2

    def cut(self, x: jax.Array) -> jax.Array:
        """Puts the tokens in the order of windows: (B, side^2, C) -> (B, count * size^2, C)."""
        batch, _, channels = x.shape
        x = x.reshape(batch, self.side, self.side, channels)
        if self.shift:
            x = jnp.roll(x, (-self.shift, -self.shift), axis=(1, 2))
        if pad := self.padded - self.side:
            x = jnp.pad(x, ((0, 0), (0, pad), (0, pad), (0, 0)))
        n = self.padded // self.size
        x = x.reshape(batch, n, self.size, n, self.size, channels).swapaxes(2, 3)
        return x.reshape(batch, -1, channels)

    def join(self, x: jax.Array) -> jax.Array:
        """The inverse of `cut`: (B, count * size^2, C) -> (B, side^2, C)."""
        batch, _, channels = x.shape
        n = self.padded // self.size
        x = x.reshape(batch, n, n, self.size, self.size, channels).swapaxes(2, 3)
        x = x.reshape(batch, self.padded, self.padded, channels)[:, : self.side, : self.side]
        if self.shift:
            x = jnp.roll(x, (self.shift, self.shift), axis=(1, 2))
        return x.reshape(batch, -1, channels)

    def regions(self) -> np.ndarray:
        """The region of the image that each token is from, in the order of windows.

        Tokens of a window attend to those of the same region only. As published, regions are
        counted from the end of the padded grid.

        Shapes: (count, size^2).
        """
        ends = (self.padded - self.size, self.padded - (self.shift or self.size))
        band = np.searchsorted(ends, np.arange(self.padded), side="right")
        return np.asarray(self.cut_numbers(3 * band[:, None] + band))

    def cut_numbers(self, grid: np.ndarray) -> np.ndarray:
        """Cuts a padded and rolled grid of numbers: (padded, padded) -> (count, size^2)."""
        n = self.padded // self.size
        cut = grid.reshape(n, self.size, n, self.size).swapaxes(1, 2)
        return cut.reshape(self.count, self.size**2)

    def mask(self) -> np.ndarray:
        """What is added to the scores of windows, 0 without a shift: (count, size^2, size^2)."""
        if not self.shift:
            return np.zeros((self.count, self.size**2, self.size**2), np.float32)
        region = self.regions()
        apart = region[:, :, None] != region[:, None, :]
        return np.where(apart, np.float32(MASKED), np.float32(0))

    def groups(self) -> np.ndarray:
        """Numbers of the sets of tokens that attend to each other, 0, 1, ...: (side, side)."""
        token = np.full((self.padded, self.padded), -1)
        raster = np.arange(self.side**2).reshape(self.side, self.side)
        token[: self.side, : self.side] = np.roll(raster, (-self.shift, -self.shift), (0, 1))
        token = self.cut_numbers(token)
        apart = 9 * np.arange(self.count)[:, None] + self.regions()
        of_token = np.empty(self.side**2, int)
        of_token[token[token >= 0]] = apart[token >= 0]
        return np.unique(of_token, return_inverse=True)[1].reshape(self.side, self.side)


def window_cycle(side: int, window: int, block: int) -> tuple[Windows, ...]:
    """The windows of successive applications of a block; they repeat.

    As published, block b of a stage has shift 0 if b is even and window // 2 if it is odd, and a
    grid that is not larger than the window is one window without a shift. The next application of
    a recursive block has the other shift, and so on alternately (ours).
    """
    if side <= window:
        return (Windows(side, side),)
    pair = (Windows(side, window), Windows(side, window, window // 2))
    return pair[::-1] if block % 2 else pair


def relative_positions(size: int) -> np.ndarray:
    """The row of the bias table for each query and key of a window: (size^2, size^2)."""
    row, column = np.divmod(np.arange(size**2), size)
    rows, columns = (at[:, None] - at + size - 1 for at in (row, column))  # 0 .. 2 * size - 2
    return rows * (2 * size - 1) + columns


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a bias for each relative position.

    out = softmax(Q K^T / sqrt(d) + bias + mask) V for each window and head of width d. The bias of
    a query and a key is an entry of a learned table, chosen by the offset between their positions.
    Padding counts as tokens of value zero before the projection to Q, K and V.

    Shapes: (B, side^2, C) -> (B, side^2, C). The table has (2 * size - 1)^2 rows.
    """

    heads: int
    layers: LayerSettings = LayerSettings()

    @nn.compact
    def __call__(self, x: jax.Array, windows: Windows) -> jax.Array:
        channels, size = x.shape[-1], windows.size
        start = nn.initializers.normal(0.02)
        table = self.param("position_bias", start, ((2 * size - 1) ** 2, self.heads))
        bias = table.at[relative_positions(size)].get(mode="promise_in_bounds")
        bias = jnp.moveaxis(bias, -1, 0)  # (heads, size^2, size^2)

        x = windows.cut(x)
        qkv = self.layers.linear(3 * channels, channels, name="qkv")(x)
        x = self._attend(qkv, bias, windows)
        x = self.layers.linear(channels, channels, name="proj")(x)
        return windows.join(x)

    def _attend(self, qkv: jax.Array, bias: jax.Array, windows: Windows) -> jax.Array:
        """Attention inside windows: (B, count * size^2, 3C) -> (B, count * size^2, C)."""
        plain = partial(plain_window_attention, windows=windows)
        if self.is_initializing():
            return plain(qkv, bias)

        def kernel(qkv: jax.Array, bias: jax.Array, interpret: bool) -> jax.Array:
            mask = windows.mask()
            if can_hold(qkv, self.heads, mask):
                return fused_windows(qkv, bias, mask, interpret)
            return plain(qkv, bias)

        kernels = self.layers.kernels
        return kernels.choose(kernels.attention, kernel, plain, images=1)(qkv, bias)


def plain_window_attention(qkv: jax.Array, bias: jax.Array, windows: Windows) -> jax.Array:
    """softmax(Q K^T / sqrt(d) + bias + mask) V for each window and head.

    Shapes: (B, count * size^2, 3C), (heads, size^2, size^2) -> (B, count * size^2, C). The last
    axis holds Q, then K, then V, each head by head.
    """
    bias = bias[None, None]
    if windows.shift:
        bias += windows.mask()[None, :, None]  # (1, count, heads, size^2, size^2)
    q, k, v = split(qkv, bias.shape[2], windows.count)
    return joined(attention(q, k, v, bias))


def resize_bias_table(table: jax.Array, size: int) -> jax.Array:
    """Resizes a bias table to windows of another size, as timm does (`resize_rel_pos_bias_table`).

    The offsets of the old table are spread over those of the new one in a geometric progression,
    so that nearby positions keep their biases; between them interpolation is linear (BEiT).

    Shapes: ((2 * old - 1)^2, heads) -> ((2 * size - 1)^2, heads).
    """
    old, new = round(len(table) ** 0.5), 2 * size - 1
    if old == new:
        return table
    ratio = _progression(old // 2, new // 2)
    steps = np.cumsum(ratio ** np.arange(old // 2))
    offsets = np.concatenate([-steps[::-1], [0], steps])
    wanted = np.arange(new) - new // 2
    columns = [np.interp(wanted, offsets, row) for row in np.eye(old)]
    weights = jnp.asarray(np.stack(columns, axis=1), table.dtype)  # (new, old)
    square = table.reshape(old, old, -1)
    exact = jax.lax.Precision.HIGHEST
    resized = jnp.einsum("ih,jw,hwc->ijc", weights, weights, square, precision=exact)
    return resized.reshape(new * new, -1)


def _progression(terms: int, total: int) -> float:
    """The q in [1.01, 1.5] with 1 + q + ... + q^(terms - 1) = total, or the nearest bound."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        if (1 - q**terms) / (1 - q) > total:
            high = q
        else:
            low = q
    return q
