"""Exit per image on a whole split: what rules cost and lose, and the choice of a threshold."""

import contextlib
import dataclasses
from collections.abc import Callable
from itertools import islice

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sret_jax.data.loader import eval_batch_size, eval_loader, steps_per_pass
from sret_jax.data.sources.source import Source
from sret_jax.data.sources.splits import open_split
from sret_jax.errors import UserError
from sret_jax.evaluation.checkpoint_evaluation import OpenedWeights, open_weights
from sret_jax.models.apply import exit_signals, normalise
from sret_jax.models.checks import check_exit
from sret_jax.models.flops import exit_macs, model_macs
from sret_jax.models.halting import ExitRule, Signals
from sret_jax.parallel.mesh import batch_sharding, replicated

QUANTILES = np.linspace(0.01, 0.99, 99)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a rule does on a split.

    Attributes:
      rule: the rule; None: all images run all loops.
      top1: fraction of the images that are classified correctly.
      loops: mean number of applications of the last block.
      macs: mean multiply-accumulates of an image, up to the exit that it leaves at.
    """

    rule: ExitRule | None
    top1: float
    loops: float
    macs: float


@dataclasses.dataclass(frozen=True)
class SplitExits:
    """What exit rules see on a split.

    Attributes:
      found: signals of every exit and image, (loops, images) each.
      correct: whether the exit's likeliest class is the label, (loops, images); never for an image
        that cannot be read.
      macs: multiply-accumulates of an image that leaves at each exit, (loops,); see `exit_macs`.
      full_macs: those of an image that runs all loops and is read out once.
    """

    found: Signals
    correct: np.ndarray
    macs: np.ndarray
    full_macs: int

    def full(self) -> Outcome:
        """What the model does with all loops."""
        return Outcome(None, float(self.correct[-1].mean()), len(self.macs), self.full_macs)

    def outcome(self, rule: ExitRule) -> Outcome:
        """What the rule does."""
        loops = rule.exits(self.found)
        top1 = self.correct[loops - 1, np.arange(len(loops))].mean()
        return Outcome(rule, float(top1), float(loops.mean()), float(self.macs[loops - 1].mean()))

    def candidates(self, kind: str) -> list[ExitRule]:
        """Rules whose thresholds are quantiles of what images show before the last exit."""
        if kind == "stable":
            return [ExitRule(kind)]
        values = np.quantile(getattr(self.found, kind)[:-1], QUANTILES)
        return [ExitRule(kind, float(threshold)) for threshold in values]

    def cheapest(self, kind: str, lose: float) -> ExitRule | None:
        """The cheapest candidate whose top-1 is at most `lose` below that of all loops, if any."""
        least = self.full().top1 - lose - 1e-9  # a difference of whole images, rounded
        outcomes = map(self.outcome, self.candidates(kind))
        fine = [outcome for outcome in outcomes if outcome.top1 >= least]
        return min(fine, key=lambda outcome: outcome.macs).rule if fine else None


def signals_of_split(
    config: ConfigDict, workdir: epath.Path, split: str, say: Callable[[str], None]
) -> SplitExits:
    """Runs the averaged weights of a run (or the raw ones) on a split, with all loops.

    Raises:
      UserError: as `evaluate_checkpoint`, or no image can leave the model early.
    """
    config = config.copy_and_resolve_references()
    config.data.eval_split = split
    opened = open_weights(config, workdir, say=say)
    check_exit(opened.model, ExitRule("stable"))
    return signals_of(opened, config)


def signals_of(opened: OpenedWeights, config: ConfigDict) -> SplitExits:
    """Runs the averaged weights (or the raw ones) on the images that were opened with them.

    Args:
      opened: the weights and the images; the model has exits.
      config: how images are read.
    """
    model = opened.model.clone(mesh=opened.mesh)
    variables = opened.weights.get("eval_ema", opened.weights["eval"])
    sharding = batch_sharding(opened.mesh)
    step = jax.jit(
        lambda variables, images: exit_signals(model, variables, normalise(model, images)),
        in_shardings=(opened.shardings, sharding),
        out_shardings=replicated(opened.mesh),
    )
    batch_size = eval_batch_size(config, opened.mesh.size)
    loader = eval_loader(opened.source, config, model.image_size, batch_size, sharding)
    found, correct = [], []
    with contextlib.closing(loader):
        for batch in islice(loader, steps_per_pass(opened.source, batch_size)):
            real = jax.device_get(batch["real"])
            seen = jax.tree.map(
                lambda x, real=real: x[:, real], jax.device_get(step(variables, batch["image"]))
            )
            label, bad = (jax.device_get(batch[name])[real] for name in ("label", "bad"))
            found.append(seen)
            correct.append((seen.label == label) & ~bad)
    joined = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *found)
    macs = np.array(exit_macs(opened.model))
    return SplitExits(joined, np.concatenate(correct, axis=1), macs, model_macs(opened.model))


def check_unseen(config: ConfigDict, workdir: epath.Path, split: str) -> None:
    """Raises UserError unless the images of a split were neither trained on nor are evaluated on.

    A threshold that is chosen on images that the model was trained on is too low, and the accuracy
    on images that it was chosen on is not that of new images.
    """
    chosen = _identities(open_split(config, workdir, split))
    for other, what in (("train_split", "was trained on"), ("eval_split", "is evaluated on")):
        name = config.data[other]
        shared = chosen & _identities(open_split(config, workdir, name))
        if shared:
            raise UserError(
                f"--choose_on={split} shares {len(shared):,} of its {len(chosen):,} images with "
                f"{name!r}, which {workdir} {what}; give a part of the training split that "
                "training did not see, such as train[90%:] of a run with "
                "--config.data.train_split=train[:90%]"
            )


def _identities(source: Source) -> set[str]:
    return set(source.identities())
