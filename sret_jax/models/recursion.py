"""Recursion: one transformer block applied many times with the same weights (SReT section 3.2).

With F the shared block and NLL_l the non-linear layer of loop l, a recursive block of L loops is

    x <- NLL_l(F(x; groups[l mod len(groups)]))    for l = 0 .. L-1.

F's parameters are broadcast to every loop of an `nn.scan`; the NLLs' are stacked along a leading
loop axis and handed to the scan as its inputs, so trace, compilation and backward cost are
linear in nothing but the length of the group cycle.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sret_jax.models.attention import PERMUTATIONS, PermutationFn, SlicedAttention
from sret_jax.models.layers import MLP, DropPath, LearnedResidual, layer_norm

REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}


class SharedBlock(nn.Module):
    """The block F whose weights, residual coefficients included, all loops share.

    x <- c1*x + c2*DropPath(Attention(LN(x)));  x <- c3*x + c4*DropPath(MLP(LN(x))).

    Shapes: (B, N, C) -> (B, N, C). `permutation` None means the default: random in training,
    fixed in evaluation. It is drawn only where `permute` asks for it, from the rng stream
    "permutation".
    """

    heads: int
    mlp_ratio: float
    drop_path_rate: float = 0.0
    permutation: str | PermutationFn | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, groups: int, permute: bool, train: bool) -> jax.Array:
        drop_path = DropPath(self.drop_path_rate)
        permutation = self._draw_permutation(x.shape[1], train) if permute else None

        y = layer_norm(dtype=self.dtype, name="norm1")(x)
        attention = SlicedAttention(self.heads, dtype=self.dtype, name="attn")
        y = attention(y, groups=groups, permutation=permutation)
        x = LearnedResidual(name="attn_residual")(x, drop_path(y, train=train))

        y = layer_norm(dtype=self.dtype, name="norm2")(x)
        y = MLP(int(self.mlp_ratio * x.shape[-1]), dtype=self.dtype, name="mlp")(y)
        return LearnedResidual(name="mlp_residual")(x, drop_path(y, train=train))

    def _draw_permutation(self, tokens: int, train: bool) -> jax.Array:
        choice = self.permutation or ("random" if train else "fixed")
        draw = PERMUTATIONS[choice] if isinstance(choice, str) else choice
        # Only "random" must have a key; the others also run where no rng is passed.
        needs_key = choice == "random" or self.has_rng("permutation")
        key = self.make_rng("permutation") if needs_key else jax.random.key(0)
        return jnp.asarray(draw(key, tokens))


class NonLinearLayer(nn.Module):
    """NLL: x <- d1*x + d2*MLP(LN(x)); no drop path, never shared between loops.

    Shapes: (B, N, C) -> (B, N, C).
    """

    nll_ratio: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = layer_norm(dtype=self.dtype, name="norm")(x)
        y = MLP(int(self.nll_ratio * x.shape[-1]), dtype=self.dtype, name="mlp")(y)
        return LearnedResidual(name="residual")(x, y)


class RecursiveBlock(nn.Module):
    """Applies one `SharedBlock` `loops` times, each time followed by that loop's own NLL.

    Parameters: "block" (shared) and "nll" (every leaf with a leading axis of `loops`). `unroll`
    (cycles of the scan laid out side by side) and `remat` ("none", "dots" keeps only the outputs
    of matrix products with weights, "full" keeps nothing) change speed and memory only.

    Shapes: (B, N, C) -> (B, N, C).
    """

    loops: int
    groups: tuple[int, ...]
    heads: int
    mlp_ratio: float
    nll_ratio: float
    drop_path_rate: float = 0.0
    permutation: str | PermutationFn | None = None
    unroll: int = 1
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        block = SharedBlock(
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            drop_path_rate=self.drop_path_rate,
            permutation=self.permutation,
            dtype=self.dtype,
            name="block",
        )
        nll = NonLinearLayer(self.nll_ratio, dtype=self.dtype, parent=None)
        nll_params = self.param("nll", _init_per_loop(nll, self.loops, x.shape[-1]))

        def apply_loops(block, x, nll_params, groups):
            for i, g in enumerate(groups):
                x = block(x, groups=g, permute=i > 0 and g > 1, train=train)
                x = nll.apply({"params": _at(nll_params, i)}, x)
            return x

        def cycle(block, x, nll_params):
            return apply_loops(block, x, nll_params, self.groups), None

        length = len(self.groups)
        cycles, leftover = divmod(self.loops, length)
        if cycles:
            scan = nn.scan(
                self._with_remat(cycle, prevent_cse=False),
                variable_broadcast="params",
                split_rngs={"params": False, "drop_path": True, "permutation": True},
                unroll=min(self.unroll, cycles),
            )
            whole = jax.tree.map(
                lambda p: p[: cycles * length].reshape(cycles, length, *p.shape[1:]), nll_params
            )  # (cycles, length, ...)
            x, _ = scan(block, x, whole)
        if leftover:
            rest = _at(nll_params, slice(cycles * length, None))

            def remainder(block, x, nll_params):
                return apply_loops(block, x, nll_params, self.groups[:leftover])

            x = self._with_remat(remainder, prevent_cse=True)(block, x, rest)
        return x

    def _with_remat(self, body: Callable, *, prevent_cse: bool) -> Callable:
        if self.remat == "none":
            return body
        return nn.remat(body, policy=REMAT_POLICIES[self.remat], prevent_cse=prevent_cse)


def _at(tree: dict, index: int | slice) -> dict:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _init_per_loop(layer: nn.Module, loops: int, channels: int) -> Callable[[jax.Array], dict]:
    """An initializer of `layer`'s parameters with a leading axis of `loops`."""

    def init(key: jax.Array) -> dict:
        token = jnp.zeros((1, 1, channels))
        keys = jax.random.split(key, loops)
        return jax.vmap(lambda k: layer.init(k, token)["params"])(keys)

    return init
