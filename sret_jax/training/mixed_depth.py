"""Mixed depth: a loss at exits of a model, beside that of its full depth.

Shen et al. (ECCV 2022) mention mixed-depth training but publish no code. This is our reading. With
L the loss of the run,

    loss = L(all loops) + sum over paths of weight * L(path),

on the same images. A path is an exit, or the whole model with fewer loops:

- Exit k is the read-out after application k of the last block (`Model.exit_logits`). All exits are
  computed in the forward pass of the model, of which they are a prefix: they cost their heads, and
  they see the drop paths and permutations of that pass.
- The whole model with k loops takes its weights from the model by `with_loops`: the shared blocks,
  and the first rows of what applications have of their own. In a model of one unique block this is
  exit k, and computed as such. In other models it is a second forward pass, whose drop paths and
  permutations are drawn independently. BatchNorm's statistics are those of the first pass; those of
  the second would be the same, because no recursive block has BatchNorm.

The labels of a path are those of the run, or the probabilities of the full depth, without a
gradient through them (self-distillation).
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sret_jax.data.views.mixing import Targets
from sret_jax.errors import UserError, did_you_mean
from sret_jax.models.apply import training_exits, training_logits
from sret_jax.models.checks import check
from sret_jax.models.loops import with_loops
from sret_jax.models.model import Model
from sret_jax.models.variables import Variables
from sret_jax.training.losses import LabelLoss, soft_label_loss

SHALLOW_PATH = 1  # folded into the key of a second forward pass
LABELS = ("data", "deepest")
Heads = tuple[jax.Array, ...]  # the logits (B, K) of each head


class Path(NamedTuple):
    """A path other than the full depth: its name, the weight of its loss, and its logits."""

    name: str
    weight: float
    heads: Heads


@dataclasses.dataclass(frozen=True)
class MixedDepth:
    """The section config.mixed_depth.

    Attributes:
      loops: loops of a path that is the whole model with fewer loops; 0: none.
      weight: weight of that path's loss, and of the exits' losses if `exit_weights` is empty.
      exits: numbers of the exits that have a loss, below the model's loops.
      exit_weights: weights of their losses.
      labels: "data": the paths learn from the labels of the run; "deepest": from the probabilities
        of the full depth.
    """

    loops: int = 0
    weight: float = 1.0
    exits: tuple[int, ...] = ()
    exit_weights: tuple[float, ...] = ()
    labels: str = "data"

    def __post_init__(self):
        for name in ("exits", "exit_weights"):  # hashable, where a config has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def check(self, model: Model) -> None:
        """Raises UserError unless the settings define paths of this model."""
        if not isinstance(self.loops, int) or not 0 <= self.loops < model.loops:
            raise UserError(
                f"config.mixed_depth.loops={self.loops} must be a whole number below the "
                f"{model.loops} loops of the model, or 0 for no shallow path"
            )
        if not self.weight > 0:
            raise UserError(
                f"config.mixed_depth.weight={self.weight} must be above 0; set "
                "config.mixed_depth.loops=0 and config.mixed_depth.exits=() for no other paths"
            )
        if self.labels not in LABELS:
            raise UserError(did_you_mean("config.mixed_depth.labels", self.labels, LABELS))
        self._check_exits(model)
        if self.loops:
            try:
                check(model.clone(loops=self.loops))
            except ValueError as e:
                raise UserError(f"config.mixed_depth: {e}") from e

    def _check_exits(self, model: Model) -> None:
        if not all(isinstance(k, int) and 1 <= k < model.loops for k in self.exits) or len(
            set(self.exits)
        ) < len(self.exits):
            raise UserError(
                f"config.mixed_depth.exits={self.exits} must hold different numbers of loops from "
                f"1 to {model.loops - 1}, below the {model.loops} loops of the model, whose loss "
                "is always counted"
            )
        if self.exits and not model.has_exits:
            raise UserError(
                f"config.mixed_depth.exits={self.exits}: a {type(model).__name__} has no exits, "
                "because it computes its logits in a __call__ of its own; define embed, unit and "
                "read_out instead"
            )
        weights = self.exit_weights
        if weights and (len(weights) != len(self.exits) or not all(w > 0 for w in weights)):
            raise UserError(
                f"config.mixed_depth.exit_weights={weights} must hold a number above 0 for each of "
                f"the exits {self.exits}, or be () to give all of them "
                f"config.mixed_depth.weight={self.weight:g}"
            )

    def remarks(self, model: Model) -> list[str]:
        """A sentence where an exit is not the model with fewer loops; otherwise nothing."""
        blocks = sum(model.blocks)
        if not self.exits or blocks == 1:
            return []
        return [
            f"config.mixed_depth.exits={self.exits}: these are read out after the last of the "
            f"{blocks} unique blocks. The blocks before it run all of their {model.loops} loops, "
            "so an exit is not the model with fewer loops."
        ]

    def weights(self, model: Model) -> dict[int, float]:
        """The weight of the loss of each exit below this model's loops."""
        each = self.exit_weights or (self.weight,) * len(self.exits)
        weights = dict(zip(self.exits, each, strict=True))
        if self.loops and _is_exit(model):
            weights[self.loops] = weights.get(self.loops, 0.0) + self.weight
        return {k: weight for k, weight in weights.items() if k < model.loops}

    def forward(
        self, model: Model, variables: Variables, images: jax.Array, key: jax.Array, *, train: bool
    ) -> tuple[Heads, list[Path], Variables]:
        """The logits of the model and of its other paths, those with fewer loops than it has.

        Args:
          model: the model.
          variables: its weights.
          images: normalised, (B, S, S, 3).
          key: random key of the batch.
          train: see `training_logits`.

        Returns:
          The logits of the model, the other paths, and the updated batch statistics.
        """
        paths: list[Path] = []
        if weights := self.weights(model):
            exits, statistics = training_exits(model, variables, images, key, train=train)
            heads = tuple(logits[-1] for logits in exits)  # (loops, B, K) -> (B, K)
            for k, weight in weights.items():
                paths.append(Path(f"exit{k}", weight, tuple(logits[k - 1] for logits in exits)))
        else:
            heads, statistics = training_logits(model, variables, images, key, train=train)
        if 0 < self.loops < model.loops and not _is_exit(model):
            key = jax.random.fold_in(key, SHALLOW_PATH)
            shallow, _ = training_logits(
                *with_loops(model, variables, self.loops), images, key, train=train
            )
            paths.append(Path(f"loops{self.loops}", self.weight, shallow))
        return heads, paths, statistics

    def loss(
        self,
        heads: Heads,
        paths: Sequence[Path],
        targets: Targets,
        label_loss: LabelLoss,
    ) -> jax.Array:
        """The sum of the weighted losses of all paths, in nats.

        Args:
          heads: the logits at full depth.
          paths: the other paths.
          targets: of the batch; see `LabelLoss`.
          label_loss: the loss of the run.
        """
        loss = label_loss(heads, targets)
        for path in paths:
            if self.labels == "data":
                loss += path.weight * label_loss(path.heads, targets)
            else:
                loss += path.weight * self_distillation_loss(path.heads, heads)
        return loss


def self_distillation_loss(shallow: Heads, deep: Heads) -> jax.Array:
    """The mean over heads of the cross-entropy with the deep path's probabilities, in nats.

    No gradient flows through the deep path.

    Shapes: per head (B, K), twice -> ().
    """
    losses = [
        soft_label_loss(student, jax.lax.stop_gradient(jax.nn.softmax(teacher)))
        for student, teacher in zip(shallow, deep, strict=True)
    ]
    return jnp.mean(jnp.stack(losses))


def _is_exit(model: Model) -> bool:
    """Whether the model with fewer loops is an exit: if it has a single unique block."""
    return sum(model.blocks) == 1 and model.has_exits


DEEP_ONLY = MixedDepth()
