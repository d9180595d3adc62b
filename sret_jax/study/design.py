"""What a study compares: arms, which are trained with several seeds, and the claims they test."""

import dataclasses
import json
import pathlib
import runpy
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from sret_jax.config_files import config_file, get_config
from sret_jax.errors import UserError, did_you_mean

# Files of the evidence of a run.
RESULT, CONFIG, METRICS = "result.json", "config.json", "metrics.jsonl"
TIMES = "times.json"  # beside the arms: the times of their train steps
FULL = "full"  # the second argument of a study's config: longer training


class Arm(NamedTuple):
    """What an arm trains.

    Attributes:
      model: settings of the model.
      others: other settings in which the arm differs from the rest, by dotted name.
      teacher: the arm whose run with seed 0 teaches this one; "": none.
      stored_crops: number of crops per image whose soft labels are stored before the arm trains;
        0: its teacher teaches live.
      most_seeds: the arm is trained with at most so many seeds; None: with all.
    """

    model: Mapping[str, Any]
    others: Mapping[str, Any] = MappingProxyType({})
    teacher: str = ""
    stored_crops: int = 0
    most_seeds: int | None = None


class Claim(NamedTuple):
    """A published claim, and the arms that test it.

    Attributes:
      title: the claim in a few words.
      published: what the paper says, with its figure if it has one.
      groups: arms that are compared; each group opens with its baseline.
    """

    title: str
    published: str
    groups: tuple[tuple[str, ...], ...]

    @property
    def arms(self) -> tuple[str, ...]:
        """All arms of the claim."""
        return tuple(arm for group in self.groups for arm in group)


@dataclasses.dataclass(frozen=True)
class Study:
    """A config file with ARMS and CLAIMS.

    Attributes:
      config: name or path of the config file, as the user gave it.
      arms: the arms by name, in the order in which they are trained.
      claims: the claims by name.
      classes: number of classes of the data.
      full: whether runs have the second argument "full".
    """

    config: str
    arms: Mapping[str, Arm]
    claims: Mapping[str, Claim]
    classes: int
    full: bool = False

    @classmethod
    def read(cls, config: str, *, full: bool = False) -> "Study":
        """Reads a config file; its code runs.

        Raises:
          UserError: there is no such config, or it is no study.
        """
        found = runpy.run_path(config_file(config))
        if missing := [name for name in ("ARMS", "CLAIMS", "CLASSES") if name not in found]:
            raise UserError(
                f"the config {config!r} has no {' and '.join(missing)}; give one of a study, such "
                "as study_cifar10"
            )
        return cls(config, found["ARMS"], found["CLAIMS"], found["CLASSES"], full)

    @property
    def name(self) -> str:
        """The name of its folders: study_cifar10, or study_cifar10_full."""
        return pathlib.Path(self.config).stem + (f"_{FULL}" if self.full else "")

    @property
    def topic(self) -> str:
        """The name of its document: DOCS/study.md for study_cifar10."""
        return pathlib.Path(self.config).stem.partition("_")[0]

    def argument(self, arm: str) -> str:
        """The value of --config that selects an arm."""
        return f"{self.config}:{arm}" + (f",{FULL}" if self.full else "")

    def settings(self, arm: str, seed: int) -> ConfigDict:
        """All settings of a run, as the config file has them."""
        config = get_config(self.argument(arm))
        config.seed = seed
        return config

    def select(self, names: Iterable[str]) -> list[str]:
        """The arms that are named, or that a named claim compares, and the teachers they need.

        Args:
          names: names of arms or claims; empty: all arms.

        Raises:
          UserError: a name is neither.
        """
        chosen = set()
        for name in names or self.arms:
            if name not in self.arms and name not in self.claims:
                raise UserError(did_you_mean("arm or claim", name, [*self.arms, *self.claims]))
            chosen |= set(self.claims[name].arms if name in self.claims else [name])
        chosen |= {self.arms[arm].teacher for arm in chosen} - {""}
        return [arm for arm in self.arms if arm in chosen]

    def timed(self) -> dict[str, list[str]]:
        """The arms whose train steps are timed in turn, by their baseline, which is the first.

        Arms that learn from a teacher are left out: they train the model of another arm.
        """
        found: dict[str, list[str]] = {}
        for baseline, *others in (
            group for claim in self.claims.values() for group in claim.groups
        ):
            arms = found.setdefault(baseline, [baseline])
            arms += [arm for arm in others if arm not in arms and not self.arms[arm].teacher]
        return found

    def runs(self, arms: Iterable[str], seeds: int) -> list[tuple[str, int]]:
        """The runs of arms, as (arm, seed): all arms with seed 0, then all with seed 1, ..."""
        arms = list(arms)
        return [
            (arm, seed)
            for seed in range(seeds)
            for arm in arms
            if seed < (self.arms[arm].most_seeds or seeds)
        ]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a study's images and runs are.

    Attributes:
      runs: folder of the workdirs, RUNS/ARM/SEED.
      data: the images, as in config.data: {"data.name": ..., "data.data_dir": ...} where they
        differ from the config's.
    """

    runs: str
    data: Mapping[str, Any]

    def workdir(self, arm: str, seed: int) -> str:
        """The workdir of a run."""
        return f"{self.runs}/{arm}/{seed}"

    @property
    def labels(self) -> str:
        """The folder of the stored soft labels."""
        return f"{self.runs}/labels"

    def overrides(self, study: Study, arm: str, seed: int) -> dict[str, Any]:
        """The settings of a run that its config file does not have, by dotted name."""
        wanted: dict[str, Any] = {"seed": seed, **self.data}
        if teacher := study.arms[arm].teacher:
            if study.arms[arm].stored_crops:
                wanted["data.soft_labels"] = self.labels
            else:
                wanted["teacher"] = self.workdir(teacher, 0)
        config = study.settings(arm, seed)
        return {
            name: value
            for name, value in wanted.items()
            if name == "seed" or _setting(config, name) != value
        }

    def config(self, study: Study, arm: str, seed: int) -> ConfigDict:
        """All settings of a run."""
        config = study.settings(arm, seed)
        config.update_from_flattened_dict(self.overrides(study, arm, seed))
        return config


def changes(then: Mapping[str, Any], now: ConfigDict) -> list[str]:
    """Sentences on settings of a run that differ from those that it would have now.

    A setting that did not exist then is no difference.
    """
    before, after = flattened(then), flattened(json.loads(json.dumps(now.to_dict())))
    return [
        f"{name} was {value!r}, is {after.get(name)!r}"
        for name, value in sorted(before.items())
        if after.get(name) != value
    ]


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _setting(config: ConfigDict, name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config
