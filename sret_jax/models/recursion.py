"""Recursion: one transformer block applied many times with the same weights (SReT section 3.2).

With F the shared block, n = nll_every and NLL_j the block's j-th non-linear layer, a recursive
block of L loops is

    x <- F(x; groups[l mod len(groups)]);  x <- NLL_j(x) where l + 1 = n * (j + 1),

for l = 0 .. L-1. The published models have n = 1: an NLL after every application.

The parameters of F are broadcast to every step of an `nn.scan`. Those of the NLLs are stacked along
a leading axis, which the scan runs over. So the traced program contains one cycle of
lcm(len(groups), n) applications whatever L is: tracing and compiling take time in proportion to the
length of the cycle. (Running time grows with L, of course.)
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sret_jax.models.attention import PERMUTATIONS, PermutationFn, SlicedAttention
from sret_jax.models.kernels.choice import Kernels
from sret_jax.models.layers import LearnedResidual, drop_path_factors, layer_norm
from sret_jax.models.remat import remat, scan_cycles, segment_length
from sret_jax.models.residual_mlp import ResidualMLP

REMAT = ("none", "dots", "block", "full")

Each = dict[str, Any]  # the random keys and the probe of each application
Inputs = tuple[Each, dict]  # the above, and the NLLs' parameters, stacked


class SharedBlock(nn.Module):
    """The block F. All loops share its weights, including its residual coefficients.

    x <- c1*x + c2*DropPath(Attention(LN(x)));  x <- c3*x + c4*DropPath(MLP(LN(x))).

    Shapes: (B, N, C) -> (B, N, C). `permutation` is (N,). `key` seeds both drop paths; without it
    nothing is dropped.
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
        nn.share_scope(self, mlp)  # the MLP's parameters lie beside the attention's
        return mlp(x, k2)


class RecursiveBlock(nn.Module):
    """Applies one `SharedBlock` `loops` times; an NLL follows every `nll_every`-th application.

    Parameters: "block" (shared) and "nll" (every leaf with a leading axis of loops // nll_every).

    `unroll` (cycles per step of the scan) and `remat` change speed and memory only. `remat` names
    which activations the forward pass stores; the backward pass recomputes all others:
      "none": all are stored;
      "dots": the inputs of each F and NLL, and their matrix products with weights;
      "block": the inputs of each F and NLL, which are recomputed one at a time;
      "full": the input of each segment of about sqrt(loops) applications (Chen et al., "Training
        Deep Nets with Sublinear Memory Cost", 2016). The backward pass recomputes one segment at a
        time. A segment of more than two applications is itself recomputed as by "block".

    `permutation=None` means random permutations in training and a fixed one in evaluation.
    Permutations that are random or given as a function take their keys from the rng stream
    "permutation", drop path from "drop_path": one key per application.

    If the collection "probes" has a variable "gradient_norm" (loops,), its gradient with respect
    to the loss is the norm of the loss's gradient at the output of each application, after the
    application's NLL if it has one.

    Shapes: (B, N, C) -> (B, N, C).

    Raises:
      ValueError: permutations need the rng stream "permutation", which is missing.
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

        permutation = self.permutation or ("random" if train else "fixed")
        each = {
            "permutation": self._permutation_keys(permutation),
            "drop_path": self._drop_path_keys(train),
            "probe": self.get_variable("probes", "gradient_norm"),
        }
        return self._recur(block, nll, permutation, x, (each, nll_params))

    def _recur(
        self,
        block: SharedBlock,
        nll: ResidualMLP,
        permutation: str | PermutationFn,
        x: jax.Array,
        inputs: Inputs,
    ) -> jax.Array:
        """Scans over whole cycles, then applies the remaining loops one by one."""
        period = math.lcm(len(self.groups), self.nll_every)
        cycles, leftover = divmod(self.loops, period)
        segment = segment_length(cycles) if self.remat == "full" else None
        draw = PERMUTATIONS[permutation] if isinstance(permutation, str) else permutation
        remat_part = self._remat_part(applications=(segment or 0) * period)
        cycle = Cycle(self.groups, self.nll_every, nll, draw, remat_part)

        counts = (period, period // self.nll_every)  # of applications and NLLs in one cycle
        if cycles:
            whole = tuple(_cycles(tree, cycles, n) for tree, n in zip(inputs, counts, strict=True))
            x = scan_cycles(cycle.apply, block, x, whole, segment=segment, unroll=self.unroll)
        if leftover:
            each, nll_params = (
                _at(tree, slice(cycles * n, None)) for tree, n in zip(inputs, counts, strict=True)
            )
            run = remat(cycle.apply) if self.remat == "full" else cycle.apply
            x, _ = run(block, x, (each, nll_params))
        return x

    def _remat_part(self, *, applications: int) -> Callable[[Callable], Callable]:
        """The rematerialisation of F and of NLLs, in segments of that many applications."""
        if self.remat in ("dots", "block") or applications > 2:
            return functools.partial(remat, dots=self.remat == "dots")
        return lambda part: part

    def _permutation_keys(self, permutation: str | PermutationFn) -> jax.Array:
        if self.has_rng("permutation"):
            return self._split(self.make_rng("permutation"))
        permutes = any(g > 1 for g in self.groups[1 : self.loops])
        draws = permutation == "random" or callable(permutation)
        if permutes and draws and not self.is_initializing():
            what = "random" if permutation == "random" else "a function of a key"
            raise ValueError(
                f"the permutations are {what}, but no rng stream 'permutation' was given, without "
                "which all of them would be equal; pass rngs={'permutation': key} to apply"
            )
        return self._split(jax.random.key(0))  # these keys are never used

    def _drop_path_keys(self, train: bool) -> jax.Array | None:
        drops = train and self.drop_path_rate > 0
        return self._split(self.make_rng("drop_path")) if drops else None

    def _split(self, key: jax.Array) -> jax.Array:
        """One key per application, split before any scan: remat and unroll change no draw."""
        return jax.random.split(key, self.loops)


@dataclasses.dataclass(frozen=True)
class Cycle:
    """The body of the scan: the applications after which groups and NLLs repeat.

    Attributes:
      groups: group counts of successive applications; they repeat.
      nll_every: number of applications of F per NLL.
      nll: the non-linear layer, without parameters.
      draw: turns a key into a permutation.
      remat: wraps F and the NLL so that the backward pass recomputes them, or returns them as is.
    """

    groups: tuple[int, ...]
    nll_every: int
    nll: ResidualMLP
    draw: PermutationFn
    remat: Callable[[Callable], Callable]

    def apply(self, block: Any, x: jax.Array, inputs: Inputs) -> tuple[jax.Array, None]:
        """Applies the cycle, or only its first applications where `inputs` has no more.

        Args:
          block: F, a `SharedBlock`.
          x: (B, N, C).
          inputs: the keys and probes of the applications, and the parameters of the NLLs.
        """
        each, nll_params = inputs
        for i in range(len(each["permutation"])):
            own = _at(each, i)
            x = self.remat(functools.partial(self._apply_block, i=i))(block, x, own)
            if (i + 1) % self.nll_every == 0:
                x = self.remat(self._apply_nll)(block, x, _at(nll_params, i // self.nll_every))
            if own["probe"] is not None:
                x = probe_gradient(x, own["probe"])
        return x, None

    def _apply_block(self, block: SharedBlock, x: jax.Array, own: Each, *, i: int) -> jax.Array:
        turn = i % len(self.groups)
        groups = self.groups[turn]
        permutes = turn > 0 and groups > 1
        permutation: Any = self.draw(own["permutation"], x.shape[1]) if permutes else None
        return block(x, groups=groups, permutation=permutation, key=own["drop_path"])

    def _apply_nll(self, block: SharedBlock, x: jax.Array, params: dict) -> jax.Array:
        del block  # `remat` passes a module as the first argument
        out: Any = self.nll.apply({"params": params}, x, jnp.ones(x.shape[0]))
        return out


@jax.custom_vjp
def probe_gradient(x: jax.Array, probe: jax.Array) -> jax.Array:
    """Returns x; the gradient of the scalar `probe` is the norm of x's gradient."""
    del probe
    return x


def _probe_forward(x: jax.Array, probe: jax.Array) -> tuple[jax.Array, None]:
    del probe
    return x, None


def _probe_backward(_: None, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gradient, jnp.linalg.norm(gradient.astype(jnp.float32).ravel())


probe_gradient.defvjp(_probe_forward, _probe_backward)


def _at(tree: Any, index: int | slice) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _cycles(tree: Any, cycles: int, count: int) -> Any:
    """Splits the leading axis into whole cycles: (cycles * count or more) -> (cycles, count)."""
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
