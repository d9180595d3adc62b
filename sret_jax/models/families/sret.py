"""The Sliced Recursive Transformer (SReT, ECCV 2022) and its constructor."""

import difflib
import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from sret_jax.models.attention import PERMUTATIONS, PermutationFn
from sret_jax.models.families.variants import VARIANTS, list_models, published
from sret_jax.models.kernels.choice import IMPLEMENTATIONS, Kernels
from sret_jax.models.layers import Pooling, Stem, layer_norm, linear
from sret_jax.models.recursion import REMAT, RecursiveBlock

STEM_STRIDE = 8
MOST_UNROLLED = 16  # the most applications that the program may contain one by one

# Settings that change speed and rounding, but not what the model computes.
SPEED_ONLY = frozenset({"unroll", "remat", "attention", "mlp", "mesh", "dtype"})
# Settings that matter in training only.
TRAINING_ONLY = frozenset({"branch_init", "drop_path_rate"})


class SReT(nn.Module):
    """Stem -> + position -> recursive blocks, pooling between stages -> mean -> LN -> linear.

    Stage s runs at stride 8 * 2^s with width heads[s] * dim. It has blocks[s] unique blocks, each
    applied `loops` times in a row. Block b of stage s has the drop-path rate
    drop_path_rate * (first_s + b) / total in all its loops, where first_s is the number of
    applications in earlier stages and total the number of all applications.

    Build it with `create_model`, which checks the sizes.

    Shapes: images (B, image_size, image_size, 3), normalised with the ImageNet mean and standard
    deviation -> logits (B, num_classes). Training needs the rng streams "drop_path" and
    "permutation" and the mutable collection "batch_stats".
    """

    num_classes: int
    image_size: int
    blocks: tuple[int, ...]
    loops: int
    groups: tuple[tuple[int, ...], ...]
    heads: tuple[int, ...]
    dim: int
    mlp_ratio: float
    nll_ratio: float
    nll_every: int = 1
    branch_init: float = 1.0
    drop_path_rate: float = 0.0
    permutation: str | PermutationFn | None = None
    unroll: int = 2  # on TPUs a loop moves more bytes than its unrolled body
    remat: str = "none"  # "full" recomputes the stem too
    attention: str = "auto"
    mlp: str = "auto"
    mesh: Mesh | None = None
    dtype: DTypeLike = jnp.float32

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage: heads * dim."""
        return tuple(h * self.dim for h in self.heads)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        kernels = Kernels(self.attention, self.mlp, self.mesh)
        stem = nn.remat(Stem, static_argnums=(2,)) if self.remat == "full" else Stem
        x = stem(self.widths[0], self.dtype, self.mesh, name="stem")(images, train)
        position = self.param("pos_embed", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x = x + position.astype(self.dtype)  # (B, H/8, W/8, C)

        total = sum(self.blocks) * self.loops
        for s, width in enumerate(self.widths):
            if s > 0:
                x = Pooling(width, self.mesh, self.dtype, name=f"pool{s}")(x)
            batch, height, breadth, _ = x.shape
            x = x.reshape(batch, height * breadth, width)
            first = sum(self.blocks[:s]) * self.loops
            for b in range(self.blocks[s]):
                x = RecursiveBlock(
                    loops=self.loops,
                    groups=self.groups[s],
                    heads=self.heads[s],
                    mlp_ratio=self.mlp_ratio,
                    nll_ratio=self.nll_ratio,
                    nll_every=self.nll_every,
                    branch_init=self.branch_init,
                    drop_path_rate=self.drop_path_rate * (first + b) / total,
                    permutation=self.permutation,
                    unroll=self.unroll,
                    remat=self.remat,
                    kernels=kernels,
                    dtype=self.dtype,
                    name=f"stage{s}_block{b}",
                )(x, train=train)
            x = x.reshape(batch, height, breadth, width)

        wide = jnp.promote_types(self.dtype, jnp.float32)
        x = jnp.mean(x, axis=(1, 2), dtype=wide)  # (B, C)
        x = layer_norm(dtype=wide, name="norm")(x)
        return linear(self.num_classes, x.shape[-1], dtype=wide, name="head")(x)


def abstract_variables(model: SReT) -> Any:
    """The shapes of the model's variables {"params", "batch_stats"}; nothing is allocated."""
    return jax.tree.map(lambda leaf: leaf, _abstract_variables(model))


@functools.lru_cache(maxsize=16)  # tracing a model takes a second
def _abstract_variables(model: SReT) -> Any:
    image = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)


def model_settings(model: SReT) -> dict[str, Any]:
    """The settings that define a model, by name: all except those in SPEED_ONLY."""
    return {
        name: getattr(model, name)
        for name in SReT.__dataclass_fields__
        if name not in SPEED_ONLY and name not in ("parent", "name")
    }


def function_settings(model: SReT) -> dict[str, Any]:
    """The settings that a trained model's output depends on, besides its weights."""
    settings = model_settings(model)
    return {name: value for name, value in settings.items() if name not in TRAINING_ONLY}


def title(model: SReT, start: str | None = None) -> str:
    """A name for the model: "sret_t", or "a model of 0.31M parameters after sret_t".

    A model has a published name if it differs from the published one at most in image size,
    classes, drop path and speed. `start` is the variant that any other model was derived from;
    None: unknown.
    """
    for name in list_models():
        settings = published(name) | {"drop_path_rate": model.drop_path_rate}
        settings["groups"] = _group_cycles(settings["groups"], len(settings["blocks"]))
        settings |= {"nll_every": 1, "permutation": None}
        if all(getattr(model, field) == value for field, value in settings.items()):
            return name
    count = sum(p.size for p in jax.tree.leaves(abstract_variables(model)["params"]))
    size = f"{count / 1e6:.2f}M" if count >= 10_000 else f"{count:,}"
    return f"a model of {size} parameters" + (f" after {start}" if start else "")


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    image_size: int = 224,
    dtype: DTypeLike = jnp.float32,
    **overrides: Any,
) -> SReT:
    """Builds a published SReT variant, or a modified one.

    Args:
      name: one of `list_models()`.
      num_classes: width of the logits.
      image_size: side of the square input in pixels, a multiple of 8 * 2^(stages - 1).
      dtype: dtype of activations and matrix products. Parameters are float32. Softmax,
        normalisation statistics and logits are float32, or float64 if dtype is.
      **overrides: any of
        blocks (unique blocks per stage), loops (applications of each block), groups (per stage,
        the group counts that successive loops cycle through; None or all ones: unsliced),
        heads (per stage), dim (channels per head), mlp_ratio, nll_ratio (hidden width divided by
        the stage's width), nll_every (an NLL follows every n-th application of a block; its
        least common multiple with the number of a stage's group counts is at most 16),
        branch_init (initial residual coefficient of every branch; 1 as published),
        drop_path_rate (rate at the last application),
        permutation ("random", "fixed", "identity" or a function (key, n) -> indices; None, the
        default, is random in training and fixed in evaluation),
        unroll, remat ("none", "dots", "block", "full"), attention and mlp ("auto": fused kernels on
        TPU and XLA elsewhere, "xla", "pallas"): speed and memory only,
        mesh (the devices over which batches are split; None: one device).

    Returns:
      A Flax module. `model.apply(variables, images_nhwc, train=False)` returns logits
      (B, num_classes).

    Raises:
      ValueError: the name or an override is unknown, or the sizes do not fit each other.
    """
    if name not in VARIANTS:
        raise ValueError(_unknown("model", name, list_models()))
    settings = published(name)
    known = [f for f in SReT.__dataclass_fields__ if f not in ("parent", "name")]
    for key in overrides:
        if key not in known:
            raise ValueError(_unknown("model setting", key, known))
    settings.update(overrides)
    settings["blocks"] = tuple(settings["blocks"])
    settings["heads"] = tuple(settings["heads"])
    settings["groups"] = _group_cycles(settings["groups"], len(settings["blocks"]))
    model = SReT(num_classes=num_classes, image_size=image_size, dtype=dtype, **settings)
    check_model(model)
    return model


def check_model(model: SReT) -> None:
    """Raises ValueError, with a one-sentence message, if the sizes do not fit each other."""
    _check_sizes(model)
    _check_choices(model)
    _check_groups(model)
    _check_periods(model)


def _unknown(what: str, value: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(value, known, 1, cutoff=0.0)[0]
    return f"unknown {what} {value!r}; did you mean {nearest!r}? (known: {', '.join(known)})"


def _group_cycles(
    groups: Sequence[Sequence[int]] | None, stages: int
) -> tuple[tuple[int, ...], ...]:
    """One cycle of group counts per stage; a cycle of ones is plain attention, written (1,)."""
    if groups is None:
        return ((1,),) * stages
    try:
        cycles = [tuple(map(operator.index, cycle)) for cycle in groups]
    except TypeError:
        cycles = [()]
    if not all(cycles):
        raise ValueError(
            f"groups={groups} must hold a tuple of whole numbers per stage, e.g. "
            "((8, 2), (4, 1), (1, 1))"
        )
    return tuple((1,) if set(cycle) == {1} else cycle for cycle in cycles)


def _check_sizes(model: SReT) -> None:
    stages = len(model.blocks)
    for field in ("heads", "groups"):
        if len(getattr(model, field)) != stages:
            raise ValueError(
                f"{field}={getattr(model, field)} has {len(getattr(model, field))} entries but "
                f"blocks={model.blocks} has {stages}; give one entry per stage"
            )
    for field in ("blocks", "heads"):
        values = getattr(model, field)
        if not values or not all(isinstance(n, int) and n > 0 for n in values):
            raise ValueError(f"{field}={values} must hold a positive whole number per stage")
    for field in ("loops", "dim", "num_classes", "image_size", "unroll", "nll_every"):
        value = getattr(model, field)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{field}={value} must be a whole number of at least 1")
    if model.nll_every > model.loops:
        raise ValueError(
            f"nll_every={model.nll_every} is more than loops={model.loops}, which leaves blocks "
            f"without an NLL; use at most {model.loops}"
        )
    last_stride = STEM_STRIDE * 2 ** (stages - 1)
    if model.image_size % last_stride:
        below = model.image_size // last_stride * last_stride
        nearest = " or ".join(str(n) for n in (below, below + last_stride) if n)
        raise ValueError(
            f"image_size={model.image_size} is not divisible by {last_stride}, the stride of the "
            f"last stage; use {nearest}"
        )
    if model.widths[0] % 2:
        raise ValueError(
            f"the stem width heads[0]*dim = {model.heads[0]}*{model.dim} = {model.widths[0]} is "
            "odd, but the stem starts at half of it; make heads[0] or dim even"
        )
    for s in range(1, stages):
        if model.widths[s] % model.widths[s - 1]:
            raise ValueError(
                f"stage {s} is {model.widths[s]} wide, not a multiple of the {model.widths[s - 1]} "
                f"of stage {s - 1} (pooling multiplies channels); change heads={model.heads}"
            )


def _check_choices(model: SReT) -> None:
    if isinstance(model.permutation, str) and model.permutation not in PERMUTATIONS:
        raise ValueError(_unknown("permutation", model.permutation, list(PERMUTATIONS)))
    if not isinstance(model.branch_init, int | float) or not 0 <= model.branch_init <= 1:
        raise ValueError(f"branch_init={model.branch_init} must be in [0, 1]")
    if model.remat not in REMAT:
        raise ValueError(_unknown("remat", model.remat, REMAT))
    for field in ("attention", "mlp"):
        if getattr(model, field) not in IMPLEMENTATIONS:
            raise ValueError(_unknown(field, getattr(model, field), IMPLEMENTATIONS))
    if not 0 <= model.drop_path_rate < 1:
        raise ValueError(f"drop_path_rate={model.drop_path_rate} must be in [0, 1)")
    for field in ("mlp_ratio", "nll_ratio"):
        if int(getattr(model, field) * min(model.widths)) < 1:
            raise ValueError(f"{field}={getattr(model, field)} leaves no hidden unit; raise it")


def _check_groups(model: SReT) -> None:
    for s, cycle in enumerate(model.groups):
        tokens = (model.image_size // (STEM_STRIDE * 2**s)) ** 2
        for g in cycle:
            if g < 1 or tokens % g:
                divisors = [d for d in range(1, tokens + 1) if tokens % d == 0]
                nearest = sorted(sorted(divisors, key=lambda d: abs(d - g))[:2])
                raise ValueError(
                    f"stage {s} has {tokens} tokens at image_size={model.image_size}, which "
                    f"{g} groups do not divide; the nearest group counts that do are "
                    f"{' and '.join(map(str, nearest))}"
                )


def _check_periods(model: SReT) -> None:
    """Limits the cycle: the program contains all its applications and would compile slowly."""
    for s, cycle in enumerate(model.groups):
        period = math.lcm(len(cycle), model.nll_every)
        if min(period, model.loops) > MOST_UNROLLED:
            raise ValueError(
                f"stage {s} repeats only every {period} applications, the least common multiple of "
                f"nll_every={model.nll_every} and its {len(cycle)} group counts, and the program "
                f"would contain each of them; at most {MOST_UNROLLED} are supported, so use a "
                "smaller nll_every, a multiple of the number of group counts where it can be"
            )
