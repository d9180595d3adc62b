"""Recursion: one transformer block applied many times with the same weights (SReT section 3.2).

With F the shared block, n = nll_every and NLL_j the block's j-th non-linear layer, a recursive
block of L loops is

    x <- F(x; groups[l mod len(groups)]);  x <- NLL_j(x) where l + 1 = n * (j + 1),

for l = 0 .. L-1. The published models have n = 1: an NLL after every application.

F's parameters are broadcast to every step of an `nn.scan`; the NLLs' are stacked along a leading
axis and handed to the scan as its inputs, so trace, compilation and backward cost are linear in
nothing but the period of the recursion, lcm(len(groups), n) applications.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sret_jax.models.attention import PERMUTATIONS, PermutationFn, SlicedAttention
from sret_jax.models.kernels import Kernels
from sret_jax.models.layers import LearnedResidual, drop_path_factors, layer_norm
from sret_jax.models.remat import remat, scan_cycles, segment_length
from sret_jax.models.residual_mlp import ResidualMLP

REMAT = ("none", "dots", "block", "full")


class SharedBlock(nn.Module):
    """The block F whose weights, residual coefficients included, all loops share.

    x <- c1*x + c2*DropPath(Attention(LN(x)));  x <- c3*x + c4*DropPath(MLP(LN(x))).

    Shapes: (B, N, C) -> (B, N, C). `permutation` is (N,); `key` is that of the two drop paths,
    which drop nothing without.
    """

    heads: int
    mlp_ratio: float
    drop_path_rate: float = 0.0
    branch_init: float = 1.0
    kernels: Kernels = Kernels()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        groups: int,
        permutation: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        keys = (None, None) if key is None else jax.random.split(key)
        k1, k2 = (drop_path_factors(key, self.drop_path_rate, x.shape[0]) for key in keys)

        y = layer_norm(dtype=self.dtype, name="norm1")(x)
        attention = SlicedAttention(self.heads, self.kernels, self.dtype, name="attn")
        y = attention(y, groups=groups, permutation=permutation)
        x = LearnedResidual(self.branch_init, name="attn_residual")(x, y, k1)

        mlp = ResidualMLP(
            int(self.mlp_ratio * x.shape[-1]),
            self.branch_init,
            self.kernels,
            self.dtype,
            norm="norm2",
            residual="mlp_residual",
        )
        nn.share_scope(self, mlp)  # its parameters lie beside the attention's
        return mlp(x, k2)


class RecursiveBlock(nn.Module):
    """Applies one `SharedBlock` `loops` times, every `nll_every`-th time followed by its own NLL.

    Parameters: "block" (shared) and "nll" (every leaf with a leading axis of loops // nll_every).

    `unroll` (periods of the scan laid out side by side) and `remat` change speed and memory only.
    Of the forward pass the backward pass finds, and computes the rest again,
      "none": everything;
      "dots": what enters each F and NLL, and their matrix products with weights;
      "block": what enters each F and NLL, of which one at a time is computed again;
      "full": what enters each segment of about sqrt(loops) applications (Chen et al., "Training
        Deep Nets with Sublinear Memory Cost", 2016). A segment is computed again as a whole, and
        if it is longer than two applications once more as by "block".

    `permutation` None means the default: random in training, fixed in evaluation. Random ones
    come from the rng stream "permutation", drop path from "drop_path": one key per application.

    A variable "gradient_norm" (loops,) in the collection "probes" gets, as its gradient, the norm
    of the loss's gradient with respect to what each application puts out, its NLL included.

    Shapes: (B, N, C) -> (B, N, C).
    """

    loops: int
    groups: tuple[int, ...]
    heads: int
    mlp_ratio: float
    nll_ratio: float
    nll_every: int = 1
    branch_init: float = 1.0
    drop_path_rate: float = 0.0
    permutation: str | PermutationFn | None = None
    unroll: int = 1
    remat: str = "none"
    kernels: Kernels = Kernels()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        block = SharedBlock(
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            drop_path_rate=self.drop_path_rate,
            branch_init=self.branch_init,
            kernels=self.kernels,
            dtype=self.dtype,
            name="block",
        )
        hidden = int(self.nll_ratio * x.shape[-1])
        nll = ResidualMLP(hidden, self.branch_init, self.kernels, self.dtype, parent=None)
        count = self.loops // self.nll_every
        nll_params = self.param("nll", _init_stacked(nll, count, x.shape[-1]))

        choice = self.permutation or ("random" if train else "fixed")
        draw = PERMUTATIONS[choice] if isinstance(choice, str) else choice
        permutes = any(g > 1 for g in self.groups[1 : self.loops])
        drops = train and self.drop_path_rate > 0
        keys = {
            "permutation": self._keys("permutation", needed=permutes and choice == "random"),
            "drop_path": self._keys("drop_path", needed=True) if drops else None,
        }

        length = len(self.groups)
        period = math.lcm(length, self.nll_every)
        cycles, leftover = divmod(self.loops, period)
        segment = segment_length(cycles) if self.remat == "full" else None
        by_part = self.remat in ("dots", "block") or (segment or 0) * period > 2
        remat_part = functools.partial(remat, dots=self.remat == "dots") if by_part else _as_is

        def apply_block(block, x, keys, *, i):
            g = self.groups[i % length]
            permute = i % length > 0 and g > 1
            permutation = draw(keys["permutation"], x.shape[1]) if permute else None
            return block(x, groups=g, permutation=permutation, key=keys["drop_path"])

        def apply_nll(_, x, params):
            return nll.apply({"params": params}, x, jnp.ones(x.shape[0]))

        def apply(block, x, inputs, *, applications=period):
            each, nll_params = inputs
            for i in range(applications):
                own = _at(each, i)
                x = remat_part(functools.partial(apply_block, i=i))(block, x, own)
                if (i + 1) % self.nll_every == 0:
                    x = remat_part(apply_nll)(block, x, _at(nll_params, i // self.nll_every))
                if own["probe"] is not None:
                    x = probe_gradient(x, own["probe"])
            return x, None

        each = {**keys, "probe": self.get_variable("probes", "gradient_norm")}
        inputs = (each, nll_params)
        counts = (period, period // self.nll_every)  # of one cycle
        if cycles:
            whole = tuple(_cycles(tree, cycles, n) for tree, n in zip(inputs, counts, strict=True))
            x = scan_cycles(apply, block, x, whole, segment=segment, unroll=self.unroll)
        if leftover:
            rest = tuple(
                _at(tree, slice(cycles * n, None)) for tree, n in zip(inputs, counts, strict=True)
            )
            x, _ = apply(block, x, rest, applications=leftover)
        return x

    def _keys(self, stream: str, *, needed: bool) -> jax.Array:
        """One key per application, made here so that no way of scanning changes the draws."""
        # Where none is needed, none need be passed.
        key = self.make_rng(stream) if needed or self.has_rng(stream) else jax.random.key(0)
        return jax.random.split(key, self.loops)


@jax.custom_vjp
def probe_gradient(x: jax.Array, probe: jax.Array) -> jax.Array:
    """Hands x on; the scalar `probe` gets the norm of x's gradient as its own."""
    del probe
    return x


def _probe_forward(x: jax.Array, probe: jax.Array) -> tuple[jax.Array, None]:
    del probe
    return x, None


def _probe_backward(_: None, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gradient, jnp.linalg.norm(gradient.astype(jnp.float32).ravel())


probe_gradient.defvjp(_probe_forward, _probe_backward)


def _as_is(part: Callable) -> Callable:
    return part


def _at(tree: Any, index: int | slice) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _cycles(tree: Any, cycles: int, count: int) -> Any:
    """The inputs of whole cycles: leading axis (cycles * count or more) -> (cycles, count)."""
    return jax.tree.map(
        lambda leaf: leaf[: cycles * count].reshape(cycles, count, *leaf.shape[1:]), tree
    )


def _init_stacked(layer: ResidualMLP, count: int, channels: int) -> Callable[[jax.Array], dict]:
    """An initializer of `layer`'s parameters with a leading axis of `count`."""

    def init(key: jax.Array) -> dict:
        token, k = jnp.zeros((1, 1, channels)), jnp.ones(1)
        keys = jax.random.split(key, count)
        return jax.vmap(lambda key: layer.init(key, token, k)["params"])(keys)

    return init
