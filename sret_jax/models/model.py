"""What all families of models share, and everything that a family says about itself."""

import functools
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from sret_jax.models.adapters import adapters_of
from sret_jax.models.halting import Exited, ExitRule, Signals, signals
from sret_jax.models.kernels.choice import Kernels
from sret_jax.models.layers.linear import FAN_IN, Initialisation, LayerSettings
from sret_jax.models.layers.residual import ResidualMLP
from sret_jax.models.per_loop import DropPathKeys, GradientProbe, NonLinearLayers
from sret_jax.models.read_out import mean_of_heads
from sret_jax.models.recursion import Observer, PerLoop, Recursion
from sret_jax.models.torch_layout import Entry

# Mean and standard deviation of ImageNet's pixels (red, green, blue) in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Shapes = Mapping[str, tuple[int, ...]]  # of arrays, by name


class Stage(NamedTuple):
    """The sizes of one stage.

    Attributes:
      side: height and width of the grid of tokens.
      width: channels of a token.
      hidden: hidden units of the block's MLP over channels.
      heads: attention heads; 0 where blocks have no attention.
      groups: number of attention slices of successive loops; they repeat.
      prefix: number of tokens, such as a class token, before those of the grid.
      token_hidden: hidden units of the block's MLP over tokens; 0 where it has none.
      window: height and width of the windows that blocks attend in; 0: they see all tokens.
    """

    side: int
    width: int
    hidden: int
    heads: int = 0
    groups: tuple[int, ...] = (1,)
    prefix: int = 0
    token_hidden: int = 0
    window: int = 0

    @property
    def cycle(self) -> int:
        """The number of applications after which the attention of a block repeats."""
        return 2 if 0 < self.window < self.side else len(self.groups)


class Unit(NamedTuple):
    """A unique block, and how its applications differ; see `Recursion`.

    Attributes:
      block: F. Where `Model.drop_path_of` is not 0, it is given a key `drop_path` in training.
      turns: what F is given as `turn` at successive applications.
      per_loop: what the applications have of their own.
    """

    block: nn.Module
    turns: tuple[Hashable, ...] = (None,)
    per_loop: tuple[PerLoop, ...] = ()


class Variant(NamedTuple):
    """A published member of a family.

    Attributes:
      settings: fields of the model.
      top1: published ImageNet top-1 in percent, at the variant's image size.
      test_crop: fraction of the shorter side that evaluation shows, as published.
      hub: name of the weights on the Hugging Face hub, after "timm/"; "" if there are none.
      timm: name of timm's module if there are no weights of it; otherwise `hub` begins with it.
      other_sizes: what is published at other image sizes, by size; its settings replace these.
    """

    settings: Mapping[str, Any]
    top1: float | None = None
    test_crop: float = 0.875
    hub: str = ""
    timm: str = ""
    other_sizes: Mapping[int, "Variant"] = MappingProxyType({})

    def at(self, image_size: int | None) -> "Variant":
        """What is published at this image size, if anything is; otherwise this variant."""
        other = self.other_sizes.get(image_size or 0, self)
        return other._replace(settings={**self.settings, **other.settings})


class Model(nn.Module, kw_only=True):  # type: ignore[call-arg]
    """A network whose blocks recur: the base class of all families.

    A subclass defines what comes before the blocks (`embed`), each block (`unit`), what comes
    between stages (`join`) and after the last block (`read_out`). Training knows the order of its
    parts by their names: "stage{s}_block{b}", "pool{s}" before stage s, "norm" and "head" at the
    end; all others form the lowest layer.

    Exit k is the read-out after application k of the last block; all blocks before it run all of
    their loops. In a model of one unique block, exit k is the model with k loops.

    Shapes: images (B, image_size, image_size, 3), normalised with `mean` and `std` -> logits
    (B, num_classes). Training may need the rng streams "drop_path" and "permutation" and the
    mutable collection "batch_stats".

    Attributes:
      num_classes: width of the logits.
      image_size: side of the square input in pixels.
      blocks: unique blocks of each stage.
      loops: applications of each block.
      nll_ratio: hidden width of the NLLs divided by the stage's width; 0: no NLLs.
      nll_every: an NLL follows every n-th application of a block.
      nll_activation: "gelu" as published; "none" leaves a linear layer of as many parameters.
      adapters: what else each application has of its own, such as ("lora:8", "norms"); see
        `sret_jax.models.adapters`.
      residual: "learned" residual coefficients, or "plain" sums.
      branch_init: initial residual coefficient of every branch, if they are learned.
      drop_path_rate: rate at the last block.
      mean, std: pixel statistics that images are normalised with.
      unroll: cycles of a recursion per step of its loop.
      remat: what the backward pass recomputes; see `Recursion`.
      backprop_loops: number of last applications of each block that gradients pass through; None:
        all.
      attention, mlp: "auto": fused kernels on TPU and XLA elsewhere, "xla", "pallas".
      mesh: the devices over which batches are split; None: one device.
      dtype: dtype of activations and matrix products. Parameters are float32. Softmax,
        normalisation statistics and logits are float32, or float64 if dtype is.
    """

    # What a family says about itself. It must override `variants`, `stages`, `embed`, `unit` and
    # `read_out`; the other attributes and methods where it differs from what they say here.
    variants: ClassVar[Mapping[str, Variant]] = {}
    start: ClassVar[Initialisation] = FAN_IN
    epsilon: ClassVar[float] = 1e-6
    # Why attention cannot be sliced into groups; "" if it can.
    why_unsliced: ClassVar[str] = "its blocks do not attend over all tokens"
    in_timm: ClassVar[Mapping[str, tuple[str, Mapping[str, Any]]]] = {}  # see `timm_names`
    pool_in_timm: ClassVar[str] = "avg"  # timm's global_pool: "avg" or "token"
    torch_ignored: ClassVar[tuple[str, ...]] = ("num_batches_tracked",)  # ends of torch names
    weightless: ClassVar[frozenset[str]] = frozenset()  # settings without effect on the weights
    resizable: ClassVar[frozenset[str]] = frozenset({"image_size"})  # what `resized` adapts

    num_classes: int
    image_size: int
    blocks: tuple[int, ...]
    loops: int = 1
    nll_ratio: float = 0.0
    nll_every: int = 1
    nll_activation: str = "gelu"
    adapters: tuple[str, ...] = ()
    residual: str = "plain"
    branch_init: float = 1.0
    drop_path_rate: float = 0.0
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    unroll: int = 2  # on TPUs a loop moves more bytes than its unrolled body
    remat: str = "none"
    backprop_loops: int | None = None
    attention: str = "auto"
    mlp: str = "auto"
    mesh: Mesh | None = None
    dtype: DTypeLike = jnp.float32

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """Makes the model of these settings, with tuples in place of lists."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})  # type: ignore[arg-type]

    @classmethod
    def timm_names(cls) -> dict[str, tuple[str, Mapping[str, Any]]]:
        """The family's architectures in timm: {timm's name: (variant, settings that differ)}.

        They are those of the variants, and those in `in_timm`.
        """
        names: dict[str, tuple[str, Mapping[str, Any]]] = {}
        for name, variant in cls.variants.items():
            published = ((variant, {}), *((v, v.settings) for v in variant.other_sizes.values()))
            names |= {v.timm or v.hub.partition(".")[0]: (name, own) for v, own in published}
        names.pop("", None)
        return {**names, **cls.in_timm}

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The sizes of each stage."""
        raise NotImplementedError

    @property
    def classifiers(self) -> tuple[str, ...]:
        """The names of the heads, in the order of `head_logits`; see `is_head`."""
        return ("head",)

    def embed(self, images: jax.Array, train: bool) -> jax.Array:
        """The tokens that enter the first block: (B, image_size, image_size, 3) -> (B, N, C)."""
        raise NotImplementedError

    def unit(self, stage: int, block: int, train: bool) -> Unit:
        """A unique block, made with parent=None, and how its applications differ."""
        raise NotImplementedError

    def join(self, x: jax.Array, stage: int) -> jax.Array:
        """What comes before a stage other than the first: (B, N, C) -> (B, N', C')."""
        raise NotImplementedError

    def read_out(self) -> nn.Module:
        """The final norm, pooling and heads, made with parent=None.

        Shapes: (B, N, C) -> a tuple of (B, num_classes) per head.
        """
        raise NotImplementedError

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """The logits: the mean of those of the heads."""
        return mean_of_heads(self.head_logits(images, train))

    def head_logits(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, ...]:
        """The logits of each head.

        In training with a teacher, the first head learns from labels and the last from the teacher.

        Shapes: images (B, image_size, image_size, 3) -> per head (B, num_classes).
        """
        if not self.has_exits:
            return (self(images, train=train),)
        last, x, _ = self.up_to_last(images, train)
        heads: tuple[jax.Array, ...] = self.reader(last(x, train=train))
        return heads

    def exit_logits(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, ...]:
        """The logits of each head at every exit; the last are those of `head_logits`.

        Shapes: images (B, image_size, image_size, 3) -> per head (loops, B, num_classes).
        """
        last, x, _ = self.up_to_last(images, train)
        read = self.reading()
        heads: tuple[jax.Array, ...]
        _, heads = last.observed(x, train=train, observe=lambda _, x: read(x))
        return heads

    def exit_each(self, images: jax.Array, rule: ExitRule) -> Exited:
        """The logits in evaluation of the exit that each image leaves at; see `ExitRule`."""
        last, x, _ = self.up_to_last(images, train=False)
        read = self.reading()
        return rule.run(last, x, lambda x: mean_of_heads(read(x)))

    def exit_signals(self, images: jax.Array) -> Signals:
        """What rules see in evaluation at every exit: (loops, B) each; see `ExitRule`."""
        last, x, _ = self.up_to_last(images, train=False)
        read = self.reading()

        def observe(before: jax.Array, x: jax.Array) -> Signals:
            return signals(mean_of_heads(read(x)), before, x)

        found: Signals
        _, found = last.observed(x, train=False, observe=observe)
        return found

    def observed(self, images: jax.Array, observe: Observer) -> list[Any]:
        """What `observe` returns in evaluation, per unique block, with a leading axis of loops.

        Args:
          images: (B, image_size, image_size, 3).
          observe: called with the input (B, N, C) and the output of each application.
        """
        last, x, seen = self.up_to_last(images, train=False, observe=observe)
        return [*seen, last.observed(x, train=False, observe=observe)[1]]

    def setup(self) -> None:
        """Makes the read-out, whose parameters lie beside those of the blocks."""
        if self.has_exits:
            self.reader = self.read_out()
            nn.share_scope(self, self.reader)

    def reading(self) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
        """The read-out as a function of arrays, which the body of a loop can call.

        Shapes: the state after an application of the last block (B, N, C) -> per head
        (B, num_classes).
        """
        read: Any = functools.partial(self.read_out().apply, {"params": self.variables["params"]})
        return read

    @nn.compact
    def up_to_last(
        self, images: jax.Array, train: bool, observe: Observer | None = None
    ) -> tuple[Recursion, jax.Array, list[Any]]:
        """Everything before the last block.

        Args:
          images: (B, image_size, image_size, 3).
          train: whether the model is in training.
          observe: called with the input and the output of each application so far.

        Returns:
          The recursion of the last block, its input (B, N, C), and what `observe` returned for each
          block before it.
        """
        x, seen = self.embed(images, train), []
        places = [(stage, block) for stage, n in enumerate(self.blocks) for block in range(n)]
        for stage, block in places:
            x = self.join(x, stage) if stage > 0 and block == 0 else x
            recursion = self.recursion(self.unit(stage, block, train), at=(stage, block))
            if (stage, block) != places[-1]:
                x, found = recursion.observed(x, train=train, observe=observe)
                seen.append(found)
        return recursion, x, seen

    @property
    def has_exits(self) -> bool:
        """Whether a read-out can follow any application of the last block.

        Not where a subclass computes the logits in a `__call__` of its own.
        """
        return type(self).__call__ is Model.__call__

    def resized(self, params: Any, old: Self) -> Any:
        """The parameters of `old`, which differs from this model in `resizable` alone, for this.

        Raises:
          ValueError: a parameter depends on the image size and cannot be resized.
        """
        raise ValueError(f"a {type(self).__name__} cannot change its image size")

    @classmethod
    def sizes(cls, shapes: Shapes) -> dict[str, Any]:
        """The num_classes and image_size that a model's arrays show, as far as they do.

        Args:
          shapes: shapes of arrays, by path such as "params/head/bias" or by name in torch.
        """
        head = shapes.get("params/head/bias", shapes.get("head.bias", ()))
        return {"num_classes": head[0]} if len(head) == 1 else {}

    @classmethod
    def nlls(cls, shapes: Shapes) -> int:
        """The number of NLLs in the first stage, over all its blocks and loops."""
        scale = re.compile(r"params/stage0_block\d+/nll/norm/scale")  # (NLLs, C)
        return sum(shape[0] for path, shape in shapes.items() if scale.fullmatch(path))

    @property
    def slicing(self) -> str:
        """How attention is sliced, in words; "" if it is not."""
        return ""

    def without_slices(self) -> Self:
        """The same model, but its attention is not sliced."""
        return self

    @classmethod
    def renamed(cls, arrays: Mapping[str, Any]) -> Mapping[str, Any]:
        """Gives the names in `torch_entries` to arrays of a file that was published under others.

        Arrays of other families keep their names.
        """
        return arrays

    def torch_entries(self) -> Iterator[Entry]:
        """Every array of the published state dict; shared arrays appear once per loop.

        Raises:
          ValueError: the model has no published names.
        """
        raise ValueError(f"a {type(self).__name__} has no published names in torch")

    def check_published(self) -> None:
        """Raises ValueError if the model has parts for which no published model has names."""
        if self.nll_ratio or self.residual != "plain" or self.adapters:
            raise ValueError(
                f"a {type(self).__name__} with nll_ratio={self.nll_ratio:g}, "
                f"adapters={self.adapters} and {self.residual} residual sums has no published "
                "names, which know neither NLLs nor adapters nor coefficients"
            )

    def drop_path_of(self, stage: int, block: int) -> float:
        """The drop-path rate of a block, in all its loops: it rises evenly from 0 to the last."""
        before, total = sum(self.blocks[:stage]) + block, sum(self.blocks)
        return self.drop_path_rate * before / max(1, total - 1)

    def check_sizes(self) -> None:
        """Raises ValueError if the family's own sizes do not fit each other; see `checks`."""

    @property
    def layers(self) -> LayerSettings:
        """The settings of all layers."""
        return LayerSettings(
            kernels=Kernels(self.attention, self.mlp, self.mesh),
            dtype=self.dtype,
            start=self.start,
            epsilon=self.epsilon,
            residual=self.residual,
            branch_init=self.branch_init,
        )

    def block_settings(self, stage: int, block: int) -> dict[str, Any]:
        """The attributes of a `PreNormBlock` that belong to a block of a stage."""
        return dict(
            parent=None,
            hidden=self.stages[stage].hidden,
            drop_path_rate=self.drop_path_of(stage, block),
            layers=self.layers,
        )

    def recur(
        self,
        block: nn.Module,
        x: jax.Array,
        *,
        at: tuple[int, int],
        train: bool,
        turns: tuple[Hashable, ...] = (None,),
        per_loop: tuple[PerLoop, ...] = (),
    ) -> jax.Array:
        """Applies a unique block `loops` times: for a subclass with a `__call__` of its own.

        Args:
          block: see `Unit`.
          x: (B, N, C).
          at: number of the stage, and of the block in it.
          train: whether the model is in training.
          turns: see `Unit`.
          per_loop: see `Unit`.
        """
        out: jax.Array = self.recursion(Unit(block, turns, per_loop), at=at)(x, train=train)
        return out

    @nn.nowrap
    def recursion(self, unit: Unit, *, at: tuple[int, int]) -> Recursion:
        """The recursion of a unique block, with NLLs, adapters and drop path as the model asks.

        Args:
          unit: the block.
          at: number of the stage, and of the block in it.
        """
        own = [*unit.per_loop]
        if self.drop_path_of(*at) > 0:
            own.append(DropPathKeys())
        if self.nll_ratio:
            hidden = int(self.nll_ratio * self.stages[at[0]].width)
            nll = ResidualMLP(hidden, self.layers, self.nll_activation, parent=None)
            own.append(NonLinearLayers(every=self.nll_every, layer=nll))
        return Recursion(
            block=unit.block.clone(parent=None, name=None),  # its parameters are the recursion's
            loops=self.loops,
            turns=unit.turns,
            per_loop=(*own, *adapters_of(self.adapters), GradientProbe()),
            unroll=self.unroll,
            remat=self.remat,
            backprop_loops=self.backprop_loops,
            name=block_name(*at),
        )


def block_name(stage: int, block: int) -> str:
    """The parameter name of a unique block."""
    return f"stage{stage}_block{block}"
