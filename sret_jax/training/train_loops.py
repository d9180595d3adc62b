"""How many loops each training step has: those of the model, drawn per step, or a curriculum.

Step t applies each block l_t times: it trains the model of `with_loops(model, variables, l_t)`,
whose gradient is that of the shared weights and of the rows (NLLs, adapters) that it uses. l_t
depends on the seed and t alone, and in a curriculum on t / T for a run of T steps. So every process
knows it without communication, and a run that resumes has the same.

With u_t the t-th number of a random stream, uniform in [0, 1), l_t is the least count whose
cumulative probability is above u_t. The probabilities of

    "uniform:A-B" are 1 / (B - A + 1) for l = A .. B;
    "poisson:M" are in proportion to (M - 1)^(l - 1) / (l - 1)! for l = 1 .. max_loops: l - 1 is
        Poisson-distributed, so that l has the mean M before it is truncated at max_loops;
    "A@F,...,B" are 1 for A until the fraction F of the steps, and at last 1 for B.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from sret_jax.errors import UserError
from sret_jax.models.checks import check
from sret_jax.models.model import Model

LOOPS_STREAM = 2  # SHUFFLE_STREAM and AUGMENT_STREAM in data/order.py are 0 and 1
FIXED = "fixed"
_COUNT, _NUMBER = r"(\d{1,4})", r"(\d{1,4}(?:\.\d{1,9})?)"
_FORMS = "fixed, uniform:1-4, poisson:3, or a curriculum such as 1@0.7,2"

Phase = tuple[float, Mapping[int, float]]


@dataclasses.dataclass(frozen=True)
class TrainLoops:
    """The loops of training steps; see the module.

    Attributes:
      setting: config.recursion.train_loops.
      phases: the fraction of the steps at which each part of the run ends, and the probabilities of
        the counts in that part.
    """

    setting: str
    phases: tuple[Phase, ...]

    @property
    def are_fixed(self) -> bool:
        """Whether all steps have the loops of the model."""
        return self.setting == FIXED

    @property
    def counts(self) -> list[int]:
        """The counts that may occur, ascending."""
        return sorted({count for _, probabilities in self.phases for count in probabilities})

    def of_steps(self, seed: int, total_steps: int) -> np.ndarray:
        """The loops of each step of a run: (total_steps,) whole numbers."""
        # NumPy promises that random_raw never changes, which it does not of Generator.random.
        stream = np.random.PCG64(np.random.SeedSequence([seed, LOOPS_STREAM]))
        u = (stream.random_raw(total_steps) >> np.uint64(11)) * 2.0**-53  # (T,) in [0, 1)
        loops = np.zeros(total_steps, int)
        start = 0
        for end, probabilities in self.phases:
            stop = round(end * total_steps)
            cumulative = np.cumsum(list(probabilities.values()))[:-1]
            index = np.searchsorted(cumulative, u[start:stop], side="right")
            loops[start:stop] = np.array(list(probabilities))[index]
            start = stop
        return loops


def make_train_loops(recursion: Any, model: Model) -> TrainLoops:
    """The loops of the training steps of a model.

    Args:
      recursion: the section config.recursion.
      model: its loops are those of "fixed", and the default of max_loops.

    Raises:
      UserError: the setting has another form, or the model cannot have such loops.
    """
    setting, most = recursion.train_loops, recursion.max_loops
    if most is not None and most < 1:
        raise UserError(f"config.recursion.max_loops={most} must be at least 1, or left out")
    train_loops = TrainLoops(setting, _phases(setting, model.loops, most or model.loops))
    counts = train_loops.counts
    if most is not None and counts[-1] > most:
        raise UserError(
            f"config.recursion.train_loops={setting} has steps of {counts[-1]} loops, more than "
            f"config.recursion.max_loops={most}; lower the one or raise the other"
        )
    for count in (counts[0], counts[-1]):
        try:
            check(model.clone(loops=count))
        except ValueError as e:
            raise UserError(f"config.recursion.train_loops={setting}: {e}") from e
    return train_loops


def _phases(setting: str, model_loops: int, max_loops: int) -> tuple[Phase, ...]:
    if setting == FIXED:
        return ((1.0, {model_loops: 1.0}),)
    if match := re.fullmatch(rf"uniform:{_COUNT}-{_COUNT}", setting):
        least, most = map(int, match.groups())
        if not 1 <= least <= most:
            raise _bad(setting, "the counts must ascend from at least 1")
        probability = 1 / (most - least + 1)
        return ((1.0, dict.fromkeys(range(least, most + 1), probability)),)
    if match := re.fullmatch(rf"poisson:{_NUMBER}", setting):
        mean = Fraction(match[1])
        if mean <= 1:
            raise _bad(setting, "the mean must be above 1, because every step has a loop")
        return ((1.0, shifted_poisson(mean, max_loops)),)
    if re.fullmatch(rf"(?:{_COUNT}@{_NUMBER},)+{_COUNT}", setting):
        parts = [part.partition("@") for part in setting.split(",")]
        counts, ends = [int(part[0]) for part in parts], [float(part[2] or 1) for part in parts]
        if min(counts) < 1:
            raise _bad(setting, "every count must be at least 1")
        if not all(start < end for start, end in itertools.pairwise((0.0, *ends))):
            raise _bad(setting, "the fractions must ascend between 0 and 1")
        return tuple((end, {count: 1.0}) for count, end in zip(counts, ends, strict=True))
    if re.fullmatch(_COUNT, setting):
        raise _bad(setting, f"one count for all steps is --config.model.loops={setting}")
    raise _bad(setting, "it has none of the known forms")


def loops_in_words(figures: Mapping[str, Any]) -> str:
    """A sentence about the figures of `Computation.loops_figures`."""
    return (
        f"Training steps have {figures['least']} to {figures['most']} loops "
        f"({figures['setting']}), {figures['mean']:.2f} on average: "
        f"{figures['mean_gmacs_per_image']:.3g} GMACs per image on average, "
        f"{figures['most_gmacs_per_image']:.3g} at most. Evaluation has {figures['evaluation']}."
    )


def shifted_poisson(mean: Fraction, most: int) -> dict[int, float]:
    """The probabilities of 1 + Poisson(mean - 1), given that it is at most `most`.

    Counts of a probability below 2^-53, which is never drawn, are left out.
    """
    weights = {1: Fraction(1)}  # exact, so that all processes draw the same
    for count in range(2, most + 1):
        weights[count] = weights[count - 1] * (mean - 1) / (count - 1)
    total = sum(weights.values())
    probabilities = {count: float(weight / total) for count, weight in weights.items()}
    return {count: p for count, p in probabilities.items() if p >= 2.0**-53}


def _bad(setting: str, why: str) -> UserError:
    return UserError(f"config.recursion.train_loops={setting!r}: {why}; give {_FORMS}")
