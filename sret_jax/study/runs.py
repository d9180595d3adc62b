"""Trains the runs of a study, several at once, and goes on where it was interrupted."""

import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from etils import epath

from sret_jax import exit_status
from sret_jax.errors import UserError, few
from sret_jax.run.report import RESULT_FILE
from sret_jax.settings.saved_config import load_config
from sret_jax.study.design import Place, Study, changes
from sret_jax.study.evidence import commit, is_finished, record_start, write_evidence
from sret_jax.study.records import Records, deviations, read_records
from sret_jax.study.tasks import Ended, Stopped, Task, run_tasks, shares
from sret_jax.text import duration

LOG_FILE = "log.txt"
LABELS = "labels"
CACHE = "compilation_cache"

Run = tuple[str, int]  # arm and seed


class Outcome(NamedTuple):
    """How a study ended.

    Attributes:
      failed: names of runs that failed, or that need one that failed.
      stopped: whether a signal stopped it.
    """

    failed: list[str]
    stopped: bool


def train_runs(
    study: Study, place: Place, runs: Sequence[Run], results: epath.Path, jobs: int
) -> Outcome:
    """Trains the runs that are not finished, in their order, and writes the evidence of each.

    A run is finished if its workdir has a result or if there is evidence of it; of a teacher, its
    students need the workdir. Prints a line for each run that ends.

    Args:
      study: the study.
      place: where images and runs are.
      runs: the runs; a teacher that they need is among them.
      results: folder of the evidence.
      jobs: how many train at once.

    Raises:
      UserError: a run was begun, or trained, with other settings.
    """
    known = read_records(results, dict(runs))
    _check_settings(study, place, runs, known)
    untrained = {run for run in runs if not is_finished(epath.Path(place.workdir(*run)))}
    unknown = [(arm, seed) for arm, seed in runs if seed not in known[arm]]
    teachers = {(study.arms[arm].teacher, 0) for arm, _ in untrained.intersection(unknown)}
    left = [run for run in runs if run in untrained.intersection([*unknown, *teachers])]
    for run in unknown:
        if run not in untrained:
            write_evidence(study, place, *run, results)
    finished = len(runs) - len(left)
    print(f"{len(runs)} runs: {finished} finished before, {len(left)} to train.", flush=True)
    if not left:
        return Outcome([], False)
    slots = shares(jobs)
    print(_described(slots), flush=True)
    progress = _Progress(study, place, results, left, finished, jobs)
    try:
        blocked = run_tasks(
            _tasks(study, place, left),
            slots,
            _environment(place.runs, len(slots[0])),
            progress.started,
            progress.ended,
        )
    except Stopped:
        return Outcome(progress.failed, True)
    for task in blocked:
        print(f"{task.name}: not started, because what it needs has failed", flush=True)
    return Outcome([*progress.failed, *(task.name for task in blocked)], False)


def train_command(study: Study, place: Place, arm: str, seed: int) -> list[str]:
    """The arguments of the training command of a run."""
    overrides = place.overrides(study, arm, seed)
    return [
        f"--config={study.argument(arm)}",
        *(f"--config.{name}={value}" for name, value in overrides.items()),
        f"--workdir={place.workdir(arm, seed)}",
    ]


def labels_command(study: Study, place: Place, arm: str) -> list[str]:
    """The arguments of the command that stores the soft labels of an arm."""
    data = {k: v for k, v in place.overrides(study, arm, 0).items() if k.startswith("data.")}
    data.pop("data.soft_labels", None)
    return [
        "generate",
        f"--config={study.argument(arm)}",
        *(f"--config.{name}={value}" for name, value in data.items()),
        f"--teacher={place.workdir(study.arms[arm].teacher, 0)}",
        f"--crops={study.arms[arm].stored_crops}",
        "--keep=full",
        f"--out={place.labels}",
    ]


class _Progress:
    """Handles the tasks that end: their evidence, and a line for each."""

    def __init__(
        self,
        study: Study,
        place: Place,
        results: epath.Path,
        left: Sequence[Run],
        finished: int,
        jobs: int,
    ):
        self._study, self._place, self._results = study, place, results
        self._left = {_name(run): run for run in left}
        self._done, self._total, self._jobs = finished, finished + len(left), jobs
        self._begun = time.monotonic()
        self._seconds: list[float] = []
        self._commits: dict[str, str | None] = {}
        self.failed: list[str] = []

    def started(self, task: Task) -> None:
        """Notes which code a task runs, which may change before it ends."""
        self._commits[task.name] = commit()

    def ended(self, ended: Ended) -> None:
        """Records a task that has ended."""
        run = self._left.pop(ended.task.name, None)
        if run:
            workdir = epath.Path(self._place.workdir(*run))
            record_start(workdir, ended, self._jobs, self._commits[ended.task.name])
        if ended.status == 0 and run:
            write_evidence(self._study, self._place, *run, self._results)
            self._done += 1
            self._seconds.append(ended.seconds)
            print(f"{ended.task.name}: {self._outcome(run)}, {self._progress(ended)}", flush=True)
        elif ended.status == 0:
            print(f"{ended.task.name}: stored in {duration(ended.seconds)}", flush=True)
        elif ended.status == exit_status.PREEMPTED:
            print(f"{ended.task.name}: {_last_line(ended.task.log)}", flush=True)
            self.failed.append(ended.task.name)
        else:
            print(
                f"{ended.task.name}: FAILED with status {ended.status}: "
                f"{_last_line(ended.task.log)} ({ended.task.log})",
                flush=True,
            )
            self.failed.append(ended.task.name)

    def _outcome(self, run: Run) -> str:
        result = json.loads((epath.Path(self._place.workdir(*run)) / RESULT_FILE).read_text())
        raw, ema = (100 * result[weights]["top1"] for weights in ("eval", "eval_ema"))
        return f"top-1 {raw:.2f}% (EMA {ema:.2f}%)"

    def _progress(self, ended: Ended) -> str:
        left = statistics.mean(self._seconds) * len(self._left) / self._jobs
        return (
            f"{duration(ended.seconds)}; {self._done} of {self._total} runs done, "
            f"about {duration(left)} left"
        )


def _tasks(study: Study, place: Place, left: Sequence[Run]) -> list[Task]:
    """The commands of the runs, and those that store soft labels before them."""
    names = {_name(run) for run in left}
    tasks: list[Task] = []
    stored: dict[str, str] = {}  # arm: name of the task that stores its labels
    for arm, seed in left:
        spec = study.arms[arm]
        needs = tuple(n for n in [f"{spec.teacher}/0"] if spec.teacher and n in names)
        if spec.stored_crops:
            if arm not in stored:
                stored[arm] = f"{LABELS} of {arm}"
                command = _module("soft_labels", labels_command(study, place, arm))
                log = pathlib.Path(place.runs) / f"{LABELS}_{LOG_FILE}"
                tasks.append(Task(stored[arm], command, log, needs))
            needs = (stored[arm],)
        workdir = pathlib.Path(place.workdir(arm, seed))
        command = _module("train", train_command(study, place, arm, seed))
        tasks.append(Task(_name((arm, seed)), command, workdir / LOG_FILE, needs))
    return tasks


def _check_settings(study: Study, place: Place, runs: Sequence[Run], known: Records) -> None:
    """Raises UserError if runs or evidence have settings that are not those of now."""
    if differing := deviations(study, known):
        raise UserError(
            f"the results have runs with other settings: {few(differing, 4)}; remove their folders "
            "to train them again, or give another --results"
        )
    for run in runs:
        begun = load_config(epath.Path(place.workdir(*run)))
        if begun and (changed := changes(begun.to_dict(), place.config(study, *run))):
            differing.append(f"{_name(run)} ({changed[0]})")
    if differing:
        raise UserError(
            f"runs in {place.runs} were begun with other settings: {few(differing, 4)}; remove "
            "these folders to train them again, or give another --runs"
        )


def _module(name: str, arguments: Sequence[str]) -> tuple[str, ...]:
    return (sys.executable, "-m", f"sret_jax.tools.{name}", *arguments)


def _environment(runs: str, cores: int) -> Mapping[str, str]:
    """The environment of the runs, which share what they compile: seeds of an arm are one program.

    Programs for another number of cores are kept apart, because they add in another order.
    """
    folder = pathlib.Path(runs).absolute() / CACHE / f"{cores or 'all'}_cores"
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return {**cache, **os.environ}


def _described(slots: Sequence[tuple[int, ...]]) -> str:
    """A sentence on what runs at once, and where."""
    if not slots[0]:
        return f"{len(slots)} at once; this system does not bind processes to cores."
    cores = len(slots[0])
    shared = len({core for slot in slots for core in slot}) < len(slots) * cores
    each = f"{cores} core{'' if cores == 1 else 's'}{' that others share' if shared else ''}"
    return f"{len(slots)} at once, each on {each}."


def _name(run: Run) -> str:
    return f"{run[0]}/{run[1]}"


def _last_line(log: pathlib.Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing was printed")
