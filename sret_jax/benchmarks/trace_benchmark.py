"""Measures how the time to trace and lower a train step, and its length, grow with loops."""

import copy
import time
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from sret_jax.benchmarks.speed_benchmark import check_counts
from sret_jax.files import write_json
from sret_jax.models.recursion import REMAT
from sret_jax.planning.plan import computation_for
from sret_jax.text import table
from sret_jax.training.experiment import Computation


def benchmark_trace(
    config: ConfigDict, *, loops: list[int], rounds: int, json_file: epath.Path | None
) -> list[dict[str, Any]]:
    """Traces and lowers the train step with each number of loops, in turn, and prints a table.

    Args:
      config: everything but model.loops; no data set is read.
      loops: numbers of loops per block; ratios are relative to the first.
      rounds: number of rounds; the smallest time is reported, because other work only adds to it.
      json_file: file that the figures are also written to.

    Raises:
      UserError: a number is out of range, or training would refuse the config.
    """
    check_counts(rounds=rounds)
    steps = [_with_loops(config, count) for count in loops]
    taken = [[_trace_and_lower(step) for step in steps] for _ in range(rounds)]
    rows = [
        {
            "model": step.model_title,
            "remat": config.model.remat or REMAT[0],
            "loops": count,
            "applications": sum(step.model.blocks) * count,
            "cpu_seconds": min(seconds for seconds, _ in column),
            "characters": column[0][1],
        }
        for count, step, column in zip(loops, steps, zip(*taken, strict=True), strict=True)
    ]
    print_table(rows, rounds)
    if json_file:
        write_json(json_file, rows)
    return rows


def _with_loops(config: ConfigDict, loops: int) -> Computation:
    changed = copy.deepcopy(config)
    changed.model.loops = loops
    return computation_for(changed, jax.devices())


def _trace_and_lower(step: Computation) -> tuple[float, int]:
    """CPU seconds without any cache, and characters of the program before XLA optimizes it."""
    jax.clear_caches()
    start = time.process_time()
    lowered = step.trace_train_step().lower()
    return time.process_time() - start, len(lowered.as_text())


def print_table(rows: list[dict[str, Any]], rounds: int) -> None:
    """Prints a line per number of loops, with ratios to the first."""
    first = rows[0]
    print(
        f"train step of {first['model']}, remat {first['remat']}: CPU time to trace and lower, "
        f"least of {rounds} rounds, and length of the program"
    )
    cells = [
        (
            f"{row['loops']:,}",
            f"{row['applications']:,}",
            f"{row['cpu_seconds']:.2f} s",
            f"{row['cpu_seconds'] / first['cpu_seconds']:.2f}",
            f"{row['characters']:,}",
            f"{row['characters'] / first['characters']:.2f}",
        )
        for row in rows
    ]
    print(table(("loops", "applications", "CPU time", "ratio", "characters", "ratio"), cells))
