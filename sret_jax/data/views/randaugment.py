"""RandAugment (Cubuk et al. 2020, section 3) in timm's notation: "rand-m9-mstd0.5-inc1"."""

import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sret_jax.data.views import pixels as ops
from sret_jax.errors import UserError, did_you_mean

MAX_LEVEL = 10.0
MOST = 15  # operations per image
UNIFORM_STD = 100.0  # timm's code for a level drawn from U(0, m)


class Operation(NamedTuple):
    """One of the fifteen operations.

    Attributes:
      apply: (pixels, argument) -> pixels, or (pixels) -> pixels if there is no argument.
      argument: maps the strength, level / 10 in [0, 1], to the argument. A strength whose sign is
        drawn may be negative.
      signed: whether the sign of the strength is drawn.
    """

    apply: Callable[..., ops.Pixels]
    argument: Callable[[float], float] | None = None
    signed: bool = False


def _factor(strength: float) -> float:
    return max(0.1, 1 + 0.9 * strength)


INCREASING = {
    "AutoContrast": Operation(ops.autocontrast),
    "Equalize": Operation(ops.equalize),
    "Invert": Operation(ops.invert),
    "Rotate": Operation(ops.rotate, lambda s: 30 * s, signed=True),
    "PosterizeIncreasing": Operation(ops.posterize, lambda s: 4 - int(4 * s)),
    "SolarizeIncreasing": Operation(ops.solarize, lambda s: 256 - int(256 * s)),
    "SolarizeAdd": Operation(ops.solarize_add, lambda s: min(128, int(110 * s))),
    "ColorIncreasing": Operation(ops.color, _factor, signed=True),
    "ContrastIncreasing": Operation(ops.contrast, _factor, signed=True),
    "BrightnessIncreasing": Operation(ops.brightness, _factor, signed=True),
    "SharpnessIncreasing": Operation(ops.sharpness, _factor, signed=True),
    "ShearX": Operation(ops.shear_x, lambda s: 0.3 * s, signed=True),
    "ShearY": Operation(ops.shear_y, lambda s: 0.3 * s, signed=True),
    "TranslateXRel": Operation(ops.translate_x, lambda s: 0.45 * s, signed=True),
    "TranslateYRel": Operation(ops.translate_y, lambda s: 0.45 * s, signed=True),
}


def _plain_factor(strength: float) -> float:
    return 0.1 + 1.8 * strength


# The original operations (inc0); some of them get weaker as the level rises.
PLAIN = {
    **{name: op for name, op in INCREASING.items() if not name.endswith("Increasing")},
    "Posterize": Operation(ops.posterize, lambda s: int(4 * s)),
    "Solarize": Operation(ops.solarize, lambda s: int(256 * s)),
    "Color": Operation(ops.color, _plain_factor),
    "Contrast": Operation(ops.contrast, _plain_factor),
    "Brightness": Operation(ops.brightness, _plain_factor),
    "Sharpness": Operation(ops.sharpness, _plain_factor),
}


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Applies `n` operations drawn with replacement, each with probability `p`.

    Each level is drawn from N(m, mstd^2), or from U(0, m) if mstd is above 100, and clipped to
    [0, mmax]. Unlike in timm, levels are at most 10, and inc0 is the same as no inc.

    Attributes:
      m: mean level, 0 to 10.
      n: number of operations drawn per image.
      p: probability that a drawn operation is applied.
      mstd: standard deviation of the level.
      mmax: greatest level.
      inc: 1 for the operations that all get stronger with the level, 0 for the original ones.
    """

    m: float = MAX_LEVEL
    n: float = 2
    p: float = 0.5
    mstd: float = 0
    mmax: float = MAX_LEVEL
    inc: float = 0

    def __post_init__(self):
        for name, expected, holds in (
            ("mmax", f"in (0, {MAX_LEVEL:g}]", 0 < self.mmax <= MAX_LEVEL),
            ("m", f"in [0, {MAX_LEVEL:g}]", 0 <= self.m <= MAX_LEVEL),
            ("n", f"a whole number from 1 to {MOST}", self.n in range(1, MOST + 1)),
            ("p", "in [0, 1]", 0 <= self.p <= 1),
            ("mstd", "0 or more", self.mstd >= 0),
            ("inc", "0 or 1", self.inc in (0, 1)),
        ):
            if not holds:
                raise UserError(
                    f"RandAugment's {name}={getattr(self, name):g} must be {expected}; "
                    "correct config.augment.policy"
                )

    @classmethod
    def parse(cls, text: str) -> "RandAugment":
        """Reads timm's notation: "rand", then -NAMEVALUE for any of m, n, p, mstd, mmax, inc.

        Raises:
          UserError: a name is unknown, or a value is not a number or is out of range.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        settings = {}
        for part in text.split("-")[1:]:
            match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
            if not match:
                raise UserError(
                    f"config.augment.policy={text!r}: {part!r} should be a name and a number, as "
                    "in rand-m9-mstd0.5-inc1"
                )
            name, value = match.groups()
            if name not in defaults:
                sentence = did_you_mean("RandAugment setting", name, defaults)
                raise UserError(f"config.augment.policy={text!r}: {sentence}")
            if name in settings:
                raise UserError(f"config.augment.policy={text!r} gives {name} twice; give it once")
            settings[name] = float(value)
        return cls(**settings)

    def __call__(self, pixels: ops.Pixels, rng: np.random.Generator) -> ops.Pixels:
        operations = tuple((INCREASING if self.inc else PLAIN).values())
        for i in rng.integers(0, len(operations), int(self.n)):
            if rng.random() < self.p:
                pixels = self._apply(operations[i], pixels, rng)
        return pixels

    def _apply(
        self, operation: Operation, pixels: ops.Pixels, rng: np.random.Generator
    ) -> ops.Pixels:
        if operation.argument is None:
            return operation.apply(pixels)
        level = self.draw_level(rng)
        sign = -1 if operation.signed and rng.random() < 0.5 else 1
        return operation.apply(pixels, operation.argument(sign * level / MAX_LEVEL))

    def draw_level(self, rng: np.random.Generator) -> float:
        """Draws a level in [0, mmax]."""
        uniform = self.mstd > UNIFORM_STD
        level = rng.uniform(0, self.m) if uniform else rng.normal(self.m, self.mstd)
        return min(max(level, 0.0), self.mmax)
