"""Cost and benefit of each remat choice: temporaries of the compiled train step against FLOPs."""

import copy
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from sret_jax.benchmarks.compiled_bytes import compile_for
from sret_jax.data.sources.splits import IMAGENET_CLASSES
from sret_jax.errors import UserError
from sret_jax.files import write_json
from sret_jax.models.recursion import REMAT
from sret_jax.models.registry import title
from sret_jax.picture import picture
from sret_jax.planning.compilation import DoesNotFit
from sret_jax.settings.config_model import create_from_config
from sret_jax.text import table

MEGABYTE = 1e6


def benchmark_remat(
    config: ConfigDict, topology: str, *, json_file: epath.Path | None, plot: epath.Path | None
) -> list[dict[str, Any]]:
    """Compiles the train step with every remat choice and prints a table; some may not fit.

    Args:
      config: everything but model.remat; no data set is read.
      topology: a name that `open_topology` takes.
      json_file: file that the figures are also written to.
      plot: PNG to draw the figures in.

    Raises:
      UserError: training would refuse the config, the topology is unknown, or no choice fits.
    """
    rows = [_row(config, choice, topology) for choice in REMAT]
    print_table(rows, config.batch_size)
    if json_file:
        write_json(json_file, rows)
    fitting = _fitting(rows)
    if not fitting:
        raise UserError(
            f"a batch of {config.batch_size:,} fits with no model.remat; give a smaller "
            "--config.batch_size"
        )
    if plot:
        draw(fitting, plot)
    return rows


def _row(config: ConfigDict, choice: str, topology: str) -> dict[str, Any]:
    """The figures of one choice, or how much memory it lacks."""
    changed = copy.deepcopy(config)
    changed.model.remat = choice
    model = create_from_config(config, config.model.num_classes or IMAGENET_CLASSES)
    name = title(model, config.model.name)
    row: dict[str, Any] = {"model": name, "topology": topology, "remat": choice}
    try:
        found = compile_for(changed, topology)
    except DoesNotFit as error:
        return row | {"does_not_fit": error.shortage}
    return row | {
        "temporary_bytes_per_image": found.memory.temporaries / found.images_per_device,
        "flops_per_image": 2 * found.macs / found.batch_size,
        "gigabytes_per_image": found.bytes_per_image / 1e9,
        "compile_seconds": found.seconds,
    }


def _fitting(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "does_not_fit" not in row]


def print_table(rows: list[dict[str, Any]], batch_size: int) -> None:
    """Prints a line for each choice, with ratios to the first that fits."""
    print(f"{rows[0]['model']}, batch {batch_size}, compiled for {rows[0]['topology']}")
    base = next(iter(_fitting(rows)), rows[0])
    ratio = f"of {base['remat']}"
    cells = []
    for row in _fitting(rows):
        memory, flops = row["temporary_bytes_per_image"], row["flops_per_image"]
        cells.append(
            (
                row["remat"],
                f"{memory / MEGABYTE:.2f} MB",
                f"{memory / base['temporary_bytes_per_image']:.2f}",
                f"{flops / 1e9:.2f}",
                f"{flops / base['flops_per_image']:.2f}",
            )
        )
    print(table(("remat", "temporaries/image", ratio, "GFLOPs/image", ratio), cells))
    for row in rows:
        if "does_not_fit" in row:
            print(f"{row['remat']} does not fit: {row['does_not_fit']}")


def draw(rows: list[dict[str, Any]], path: epath.Path) -> None:
    """Draws temporaries against FLOPs, both relative to the first choice that fits."""
    with picture(path, 5.5, 3.6, dpi=150) as figure:
        axes = figure.subplots()
        first = rows[0]
        for row in rows:
            flops = row["flops_per_image"] / first["flops_per_image"]
            memory = row["temporary_bytes_per_image"] / first["temporary_bytes_per_image"]
            axes.plot(flops, memory, "o", label=row["remat"])
        axes.set(
            xlabel=f"FLOPs of a step, relative to {first['remat']}",
            ylabel=f"temporaries, relative to {first['remat']}",
            title=f"{first['model']}: remat, compiled for {first['topology']}",
            xlim=(0.95, None),
            ylim=(0, 1.1),
        )
        axes.grid(alpha=0.3)
        axes.legend(title="model.remat")
