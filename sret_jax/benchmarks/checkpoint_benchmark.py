"""Measures the cost of checkpoints: delay of training, disk space, time to restore."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from itertools import count
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from sret_jax.checkpoints.manager import CHECKPOINTS, Checkpoints
from sret_jax.errors import UserError
from sret_jax.files import absolute, write_json
from sret_jax.parallel.mesh import with_shardings
from sret_jax.terminal import Progress
from sret_jax.training.experiment import Experiment, open_experiment
from sret_jax.training.state import TrainState, to_items

GOAL_STEPS, GOAL_SHARE = 100, 0.05  # goal: a save takes less than 5% of the time of 100 steps
GOAL_RATIO = 1.05  # goal: bytes on disk divided by bytes of the arrays
MEGABYTE = 1e6


@dataclasses.dataclass(frozen=True)
class Round:
    """The measurements of one round, in seconds.

    Attributes:
      plain: time of the window of steps without a save.
      saving: time of the same window with a save at its start.
      call: the part of `saving` until save() returned.
      save: time until a save is on disk while nothing else runs.
      save_cpu: CPU time of that save on all cores.
      restore: time to restore into a fresh manager, with the files in the system's cache.
    """

    plain: float
    saving: float
    call: float
    save: float
    save_cpu: float
    restore: float


def benchmark_checkpoint(
    config: ConfigDict,
    folder: epath.Path,
    *,
    steps: int,
    rounds: int,
    json_file: epath.Path | None,
) -> dict[str, Any]:
    """Measures with real train steps on synthetic data, and prints a table of medians.

    Args:
      config: from configs/common.py; no data set is read.
      folder: new folder on the storage to measure; it is deleted at the end.
      steps: steps per window.
      rounds: number of rounds; each measures everything.
      json_file: file that the figures are also written to.

    Raises:
      UserError: a number is out of range, the folder exists, or training would refuse the config.
    """
    for name, value in (("steps", steps), ("rounds", rounds)):
        if value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    folder = absolute(folder)
    if folder.exists():
        raise UserError(f"--folder={folder} exists, and would be deleted; name a new folder")
    config.data.synthetic = True
    try:
        report = measure(open_experiment(config, folder), steps, rounds)
    finally:
        folder.rmtree(missing_ok=True)
    print_report(report)
    if json_file:
        write_json(json_file, report)
    return report


def measure(experiment: Experiment, steps: int, rounds: int) -> dict[str, Any]:
    """Measures all figures; the last checkpoints stay in the experiment's workdir."""
    bench = Bench(experiment)
    try:
        bench.steps(max(1, steps // 10))
        bench.save()
        bench.checkpoints.settle()
        with Progress("Measuring", rounds, "rounds") as progress:
            results = [
                bench.round(steps, save_first=number % 2 == 0)
                for number in progress.counted(range(rounds))
            ]
    finally:
        bench.checkpoints.close()
    newest = experiment.workdir / CHECKPOINTS / str(bench.checkpoints.steps[0])
    arrays = jax.tree.leaves(to_items(bench.state))
    params = jax.tree.leaves(bench.state.variables["params"])
    return {
        "devices": f"{jax.device_count()} {jax.devices()[0].platform}",
        "cores": os.cpu_count(),
        "model": experiment.model_title,
        "batch_size": experiment.config.batch_size,
        "parameters": sum(x.size for x in params),
        "arrays": len(arrays),
        "steps": steps,
        "rounds": rounds,
        **times(results, steps),
        **sizes(sum(x.nbytes for x in arrays), folder_bytes(newest)),
    }


class Bench:
    """A state in training, and the checkpoints that it is saved to."""

    def __init__(self, experiment: Experiment):
        self._experiment = experiment
        config = experiment.config
        self._targets = to_items(with_shardings(experiment.abstract_state, experiment.shardings))
        self._train_step = experiment.compile_train_step()
        self._batches = experiment.train_batches(start_step=0)
        self._numbers = count(1)
        self.state: TrainState = experiment.init_state()
        self.checkpoints = Checkpoints(
            experiment.workdir,
            keep_latest=config.checkpoint.keep_latest,
            keep_best=config.checkpoint.keep_best,
        )

    def round(self, steps: int, *, save_first: bool) -> Round:
        """Measures everything once; alternating the order of the windows cancels drift."""
        if save_first:
            call, saving = self._saving(steps)
            plain = seconds(lambda: self.steps(steps))
        else:
            plain = seconds(lambda: self.steps(steps))
            call, saving = self._saving(steps)
        cpu = time.process_time()
        save = seconds(self._save_whole)
        cpu = time.process_time() - cpu
        return Round(plain, saving, call, save, cpu, seconds(self._restore))

    def steps(self, number: int) -> None:
        """Takes `number` steps and waits for the last one."""
        for _ in range(number):
            self.state, _ = self._train_step(self.state, next(self._batches))
        jax.block_until_ready(self.state)

    def save(self) -> None:
        """Starts saving, as a run does before an evaluation."""
        self.checkpoints.save(next(self._numbers), to_items(self.state))

    def _saving(self, steps: int) -> tuple[float, float]:
        """Seconds of save() and of the window that it begins; returns when the save is on disk."""
        call = seconds(self.save)
        rest = seconds(lambda: self.steps(steps))
        self.checkpoints.settle()
        return call, call + rest

    def _save_whole(self) -> None:
        self.save()
        self.checkpoints.settle()

    def _restore(self) -> None:
        checkpoints = Checkpoints(self._experiment.workdir, create=False)
        jax.block_until_ready(checkpoints.restore_newest(self._targets))
        checkpoints.close()


def seconds(action: Callable[[], object]) -> float:
    """The time that the action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def times(results: list[Round], steps: int) -> dict[str, float]:
    """Medians over the rounds.

    The stall of a save is the time it adds to the window of the same round. Its share is the stall
    divided by the time of GOAL_STEPS steps: stall / (GOAL_STEPS * step).
    """
    plain = [r.plain for r in results]
    step = statistics.median(plain) / steps
    call = statistics.median(r.call for r in results)
    stall = statistics.median(r.saving - r.plain for r in results)
    return {
        "step_seconds": step,
        "window_spread": (max(plain) - min(plain)) / statistics.median(plain),
        "call_seconds": call,
        "call_share": call / (GOAL_STEPS * step),
        "stall_seconds": stall,
        "stall_share": stall / (GOAL_STEPS * step),
        "save_seconds": statistics.median(r.save for r in results),
        "save_cpu_seconds": statistics.median(r.save_cpu for r in results),
        "restore_seconds": statistics.median(r.restore for r in results),
    }


def sizes(array_bytes: int, disk_bytes: int) -> dict[str, float]:
    """Bytes of the arrays, bytes of the checkpoint on disk, and the second divided by the first."""
    return {
        "array_bytes": array_bytes,
        "disk_bytes": disk_bytes,
        "disk_ratio": disk_bytes / array_bytes,
    }


def folder_bytes(folder: epath.Path) -> int:
    """The total size of all files in a folder and its subfolders."""
    return sum(
        folder_bytes(path) if path.is_dir() else path.stat().length for path in folder.iterdir()
    )


def print_report(report: dict[str, Any]) -> None:
    """Prints the table and its explanation."""
    megabytes = report["array_bytes"] / MEGABYTE
    print(
        f"{report['model']}, {report['parameters'] / 1e6:.2f}M parameters; a state of "
        f"{report['arrays']:,} arrays, {megabytes:,.1f} MB; {report['devices']} devices, "
        f"{report['cores']} cores; medians of {report['rounds']} rounds of {report['steps']} steps "
        f"of {report['batch_size']} images"
    )
    of = f"of {GOAL_STEPS} steps"
    rows = [
        ("a step", report["step_seconds"], f"windows differ by {report['window_spread']:.1%}"),
        ("save() returns after", report["call_seconds"], f"{report['call_share']:.2%} {of}"),
        ("a save adds to training", report["stall_seconds"], f"{report['stall_share']:.2%} {of}"),
        (
            "a save alone",
            report["save_seconds"],
            f"{megabytes / report['save_seconds']:,.0f} MB/s, "
            f"{1000 * report['save_cpu_seconds']:,.0f} ms of the cores",
        ),
        (
            "a restore",
            report["restore_seconds"],
            f"{megabytes / report['restore_seconds']:,.0f} MB/s",
        ),
    ]
    for name, spent, remark in rows:
        print(f"{name:26}{1000 * spent:>10,.1f} ms   {remark}")
    print(
        f"{'on disk':26}{report['disk_bytes'] / MEGABYTE:>10,.1f} MB   "
        f"{report['disk_ratio']:.3f} of the arrays' bytes"
    )
    if report["window_spread"] > GOAL_SHARE:
        print("Windows without a save differ that much that something else uses the machine.")
    if report["save_seconds"] > report["steps"] * report["step_seconds"]:
        print("A save outlasts the window, which shows only a part of its cost; raise --steps.")
    share, ratio = max(report["call_share"], report["stall_share"]), report["disk_ratio"]
    print(
        f"A save costs {share:.2%} of {GOAL_STEPS} steps: the goal of less than {GOAL_SHARE:.0%} "
        f"is {_met(share < GOAL_SHARE)}."
    )
    print(
        f"A checkpoint takes {ratio:.3f} times the bytes of its arrays: the goal of at most "
        f"{GOAL_RATIO} is {_met(ratio <= GOAL_RATIO)}."
    )


def _met(met: bool) -> str:
    return "met" if met else "not met"
