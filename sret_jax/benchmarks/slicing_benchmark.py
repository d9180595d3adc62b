"""Measures what slicing saves compared with the unsliced model: multiply-accumulates and time."""

import copy
import statistics
import tempfile
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from sret_jax.benchmarks.compiled_bytes import compile_for
from sret_jax.benchmarks.speed_benchmark import Step, check_counts, describe, measure, open_step
from sret_jax.errors import UserError, did_you_mean
from sret_jax.files import write_json
from sret_jax.models.registry import list_models, variant
from sret_jax.settings.config_model import create_from_config
from sret_jax.text import table

MODES = {"train": True, "infer": False}


def benchmark_slicing(
    config: ConfigDict,
    *,
    models: list[str],
    rounds: int,
    steps: int,
    topology: str | None,
    json_file: epath.Path | None,
) -> list[dict[str, Any]]:
    """Measures or compiles each model sliced and unsliced, and prints what slicing saves.

    Args:
      config: everything but the model's name and, for the unsliced model, its groups.
      models: names of published variants.
      rounds: rounds in which both models take turns; the median of the rounds' ratios is reported.
      steps: steps per round.
      topology: a name that `open_topology` takes; compiles for it and compares bytes, without
        measuring.
      json_file: file that the figures are also written to.

    Raises:
      UserError: a model is unknown, a number is out of range, or training would refuse the config.
    """
    check_counts(rounds=rounds, steps=steps)
    sliced = [name for name in list_models() if "groups" in variant(name).settings]
    for name in models:
        if name not in sliced:
            raise UserError(did_you_mean("--models", name, sliced))
    if topology:
        rows = [compare_compiled(config, name, topology) for name in models]
        print_compiled(rows)
    else:
        rows = [compare(config, name, rounds, steps) for name in models]
        print_table(rows, rounds)
    if json_file:
        write_json(json_file, rows)
    return rows


def compare(config: ConfigDict, name: str, rounds: int, steps: int) -> dict[str, Any]:
    """The fractions of the unsliced model's GMACs, and of its time in each mode, that are saved."""
    row: dict[str, Any] = {}
    for mode, train in MODES.items():
        sliced, unsliced = open_twins(config, name, train=train)
        row |= describe(sliced)
        row["unsliced_gmacs_per_image"] = describe(unsliced)["gmacs_per_image"]
        times = zip(*measure([sliced, unsliced], rounds, steps), strict=True)
        saved = [1 - ours.seconds / theirs.seconds for ours, theirs in times]
        row[f"{mode}_time_saved"] = statistics.median(saved)
        row[f"{mode}_time_saved_range"] = [min(saved), max(saved)]
    row["macs_saved"] = 1 - row["gmacs_per_image"] / row["unsliced_gmacs_per_image"]
    return row


def compare_compiled(config: ConfigDict, name: str, topology: str) -> dict[str, Any]:
    """The fractions of the unsliced model's bytes and MACs in a train step that are saved."""
    sliced = copy.deepcopy(config)
    sliced.model.name = name
    unsliced = copy.deepcopy(sliced)
    unsliced.model.groups = ((1,),) * len(create_from_config(sliced, 1).blocks)
    ours, theirs = (compile_for(c, topology) for c in (sliced, unsliced))
    return {
        "model": name,
        "topology": topology,
        "batch_size": config.batch_size,
        "dtype": config.model.dtype,
        "gigabytes_per_image": ours.bytes_per_image / 1e9,
        "unsliced_gigabytes_per_image": theirs.bytes_per_image / 1e9,
        "bytes_saved": 1 - ours.bytes_per_image / theirs.bytes_per_image,
        "main_memory_gigabytes_per_image": ours.hbm_bytes / ours.images_per_device / 1e9,
        "main_memory_saved": 1 - ours.hbm_bytes / theirs.hbm_bytes,
        "temporaries_saved": 1 - ours.memory.temporaries / theirs.memory.temporaries,
        "macs_saved": 1 - ours.macs / theirs.macs,
    }


def open_twins(config: ConfigDict, name: str, *, train: bool) -> tuple[Step, Step]:
    """The step of the model with the config's groups, and the step of the unsliced model."""
    sliced = copy.deepcopy(config)
    sliced.model.name = name
    unsliced = copy.deepcopy(sliced)
    with tempfile.TemporaryDirectory() as folder:
        first = open_step(sliced, epath.Path(folder), train=train)
        unsliced.model.groups = ((1,),) * len(first.experiment.model.blocks)
        return first, open_step(unsliced, epath.Path(folder), train=train)


def print_table(rows: list[dict[str, Any]], rounds: int) -> None:
    """Prints a line per model."""
    first = rows[0]
    print(
        f"batch {first['batch_size']}, {first['image_size']} pixels, {first['dtype']}; "
        f"{first['devices']} devices, {first['cores']} cores; medians of {rounds} rounds "
        "(least to largest)"
    )
    headings = ("", "GMACs", "unsliced", "saved", *(f"{mode}: time saved" for mode in MODES))
    cells = [
        (
            row["model"],
            f"{row['gmacs_per_image']:.3f}",
            f"{row['unsliced_gmacs_per_image']:.3f}",
            f"{row['macs_saved']:.1%}",
            *(_time_saved(row, mode) for mode in MODES),
        )
        for row in rows
    ]
    print(table(headings, cells))


def _time_saved(row: dict[str, Any], mode: str) -> str:
    least, largest = row[f"{mode}_time_saved_range"]
    return f"{row[f'{mode}_time_saved']:.1%} ({least:.1%} to {largest:.1%})"


def print_compiled(rows: list[dict[str, Any]]) -> None:
    """Prints a line per model."""
    first = rows[0]
    print(f"batch {first['batch_size']}, {first['dtype']}; compiled for {first['topology']}")
    headings = (
        *("", "GB/image", "unsliced", "saved"),
        *("main memory", "saved", "temporaries saved", "MACs saved"),
    )
    cells = [
        (
            row["model"],
            f"{row['gigabytes_per_image']:.3f}",
            f"{row['unsliced_gigabytes_per_image']:.3f}",
            f"{row['bytes_saved']:.1%}",
            f"{row['main_memory_gigabytes_per_image']:.3f}",
            f"{row['main_memory_saved']:.1%}",
            f"{row['temporaries_saved']:.1%}",
            f"{row['macs_saved']:.1%}",
        )
        for row in rows
    ]
    print(table(headings, cells))
