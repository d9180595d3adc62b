"""The settings of families whose blocks attend over all tokens, which can be sliced into groups."""

import operator
from collections.abc import Sequence
from typing import Any, ClassVar, Self

from sret_jax.errors import did_you_mean
from sret_jax.models.checks import check_length, check_positive
from sret_jax.models.layers.attention import PERMUTATIONS, PermutationFn, slice_cycle
from sret_jax.models.layers.blocks import AttentionBlock
from sret_jax.models.model import Model, Unit
from sret_jax.models.per_loop import Permutations


class SlicedModel(Model, kw_only=True):  # type: ignore[call-arg]
    """A model of `AttentionBlock`s.

    Attributes:
      heads: attention heads of each stage.
      dim: channels per head; a stage's width is heads * dim.
      mlp_ratio: hidden width of the MLPs divided by the stage's width.
      groups: per stage, the group counts that successive loops cycle through; (): unsliced.
      permutation: "random", "fixed", "identity" or a function (key, n) -> indices; None is random
        in training and fixed in evaluation.
    """

    why_unsliced: ClassVar[str] = ""
    weightless: ClassVar[frozenset[str]] = frozenset({"groups", "permutation"})

    heads: tuple[int, ...]
    dim: int
    mlp_ratio: float = 4.0
    groups: tuple[tuple[int, ...], ...] = ()
    permutation: str | PermutationFn | None = None

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """See `Model`; groups=None and () mean unsliced."""
        groups = group_cycles(settings.pop("groups", None), len(settings["blocks"]))
        return super().of(**settings, groups=groups)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage: heads * dim."""
        return tuple(h * self.dim for h in self.heads)

    def unit(self, stage: int, block: int, train: bool) -> Unit:
        """See `Model`."""
        sizes, settings = self.stages[stage], self.block_settings(stage, block)
        chosen = self.permutation or ("random" if train else "fixed")
        return Unit(
            AttentionBlock(heads=sizes.heads, prefix=sizes.prefix, **settings),
            turns=slice_cycle(sizes.groups),
            per_loop=(Permutations(chosen=chosen, prefix=sizes.prefix),),
        )

    @property
    def slicing(self) -> str:
        """See `Model`."""
        sliced = any(set(cycle) != {1} for cycle in self.groups)
        return f"attention groups {self.groups}" if sliced else ""

    def without_slices(self) -> Self:
        """See `Model`."""
        return self.clone(groups=((1,),) * len(self.blocks))

    def check_sizes(self) -> None:
        """See `Model`; a family with sizes of its own calls this first."""
        check_length(self, ("heads", "groups"))
        check_positive(self, ("heads", "dim"))
        if isinstance(self.permutation, str) and self.permutation not in PERMUTATIONS:
            raise ValueError(did_you_mean("permutation", self.permutation, PERMUTATIONS))
        if int(self.mlp_ratio * min(self.widths)) < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} leaves no hidden unit; raise it")


def check_pooling(model: SlicedModel) -> None:
    """Raises ValueError unless pooling can multiply the channels of each stage to the next's."""
    for s in range(1, len(model.widths)):
        if model.widths[s] % model.widths[s - 1]:
            raise ValueError(
                f"stage {s} is {model.widths[s]} wide, not a multiple of the "
                f"{model.widths[s - 1]} of stage {s - 1} (pooling multiplies channels); change "
                f"heads={model.heads}"
            )


def group_cycles(
    groups: Sequence[Sequence[int]] | None, stages: int
) -> tuple[tuple[int, ...], ...]:
    """One cycle of group counts per stage; a cycle of ones is plain attention, written (1,)."""
    if not groups:
        return ((1,),) * stages
    try:
        cycles = [tuple(map(operator.index, cycle)) for cycle in groups]
    except TypeError:
        cycles = [()]
    if not all(cycles):
        raise ValueError(
            f"groups={groups} must hold a tuple of whole numbers per stage, e.g. "
            "((8, 2), (4, 1), (1, 1)), or be () for attention that is not sliced"
        )
    return tuple((1,) if set(cycle) == {1} else cycle for cycle in cycles)
