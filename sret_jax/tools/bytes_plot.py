"""Draws the bytes a train step moves for each image, from what the benchmark wrote.

python -m sret_jax.tools.benchmark train --config=configs/sret_t.py --topology=v5e:1x1 --json=FILE
python -m sret_jax.tools.bytes_plot FILE ... --plot=FILE.png
"""

import argparse
import json
import pathlib
from typing import Any

from sret_jax.cli import clear_errors
from sret_jax.errors import UserError
from sret_jax.tools.compiled_bytes import GOALS


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sret_jax.tools.bytes_plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", type=pathlib.Path, nargs="+", help="of benchmark train --json")
    parser.add_argument("--plot", type=pathlib.Path, required=True, help="the PNG to draw")
    args = parser.parse_args(argv)
    with clear_errors():
        draw([read_report(file) for file in args.files], args.plot)


def read_report(path: pathlib.Path) -> dict[str, Any]:
    """What `benchmark_bytes` wrote.

    Raises:
      UserError: it wrote no such file.
    """
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if {"model", "attention", "mlp", "topology", "gigabytes_per_image"} <= report.keys():
            return report
    except (OSError, ValueError, AttributeError):
        pass
    raise UserError(
        f"{path} holds no bytes of a train step; write it with python -m "
        "sret_jax.tools.benchmark train --topology=v5e:1x1 --json=FILE"
    )


def draw(reports: list[dict[str, Any]], path: pathlib.Path) -> None:
    """A bar for each report, by model, and the models' goals as lines across theirs."""
    from matplotlib.figure import Figure

    reports = sorted(reports, key=lambda r: (r["model"], -r["gigabytes_per_image"]))
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for place, report in enumerate(reports):
        size, goal = report["gigabytes_per_image"], GOALS.get(report["model"])
        bar = axes.bar(place, size, 0.6, color="tab:blue")
        axes.bar_label(bar, fmt="%.3f", padding=2)
        if goal:
            axes.hlines(goal, place - 0.5, place + 0.5, "tab:red", linestyles="dashed")
    labels = [f"{r['model']}\nattention={r['attention']}\nmlp={r['mlp']}" for r in reports]
    topologies = ", ".join(sorted({r["topology"] for r in reports}))
    axes.set(
        xticks=range(len(reports)),
        xticklabels=labels,
        ylabel="GB per image of a train step",
        title=f"Compiled for {topologies}; dashed: the goal, below a plain ViT's",
    )
    axes.margins(y=0.12)
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=120)


if __name__ == "__main__":
    main()
