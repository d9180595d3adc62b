"""Reads what a study keeps in its folder of results: the evidence of runs, and times of steps."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from sret_jax.errors import UserError
from sret_jax.study.design import CONFIG, RESULT, TIMES, Study, changes

NEEDED = {"parameters", "macs", "wall_seconds", "machine", "data", "images"}  # of a result.json
SPREAD = {"median", "least", "largest"}


@dataclasses.dataclass(frozen=True)
class Record:
    """A finished run.

    Attributes:
      arm, seed: which run it is.
      result: its result.json.
      config: its config.json.
    """

    arm: str
    seed: int
    result: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def top1(self) -> float:
        """Test top-1 of the moving average after the last step, in percent."""
        return 100 * self.result["eval_ema"]["top1"]


Records = Mapping[str, Mapping[int, Record]]  # by arm and seed
Times = Mapping[str, Any]  # by the baseline of a group: what `time_arms` returned


def read_records(results: epath.Path, arms: Iterable[str]) -> Records:
    """Reads the evidence of all runs of the arms.

    Raises:
      UserError: a file is damaged.
    """
    return {arm: dict(_records(results / arm)) for arm in arms}


def read_times(study: Study, results: epath.Path) -> dict[str, Any]:
    """The times of train steps that `sret_jax.tools.study --times` has measured, by baseline.

    Groups with an arm whose model or batch has changed since are left out.

    Raises:
      UserError: the file is damaged.
    """
    file = results / TIMES
    try:
        times: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        for group in times.values():
            assert group.keys() >= {"processor", "devices", "cores", "load"}
            for arm in group["arms"].values():
                assert arm["seconds"].keys() == arm["relative"].keys() == SPREAD
        return {
            baseline: group
            for baseline, group in times.items()
            if not any(
                arm not in study.arms or changes(timed["settings"], study.settings(arm, 0))
                for arm, timed in group["arms"].items()
            )
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as e:
        raise UserError(f"{file} is damaged ({e!r}); remove it, and give --times again") from e


def _records(folder: epath.Path) -> Iterable[tuple[int, Record]]:
    if not folder.exists():
        return
    for run in sorted(folder.iterdir(), key=lambda path: path.name):
        if not run.name.isdigit() or not (run / RESULT).exists():
            continue
        try:
            result, config = (json.loads((run / name).read_text()) for name in (RESULT, CONFIG))
            record = Record(folder.name, int(run.name), result, config)
            assert (
                record.top1 >= 0
                and result.keys() >= NEEDED
                and result["seed"] == record.seed == config["seed"]
            )
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as e:
            raise UserError(f"{run} is damaged ({e!r}); remove it, and run the study again") from e
        yield record.seed, record


def deviations(study: Study, records: Records) -> list[str]:
    """A sentence on each run whose settings are not those that the config file has now."""
    return [
        f"{arm}/{seed} ({differing[0]})"
        for arm, runs in records.items()
        for seed, run in runs.items()
        if (differing := changes(run.config, study.settings(arm, seed)))
    ]
