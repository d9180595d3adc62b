"""Draws reports of `benchmark train` and `infer`: measured shares, or bytes of compiled steps."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from sret_jax.errors import UserError
from sret_jax.picture import picture

Report = dict[str, Any]
KERNELS = {"all": "with kernels", "some": "some kernels", "no": "without kernels"}  # of a report


def plot_reports(files: list[epath.Path], plot: epath.Path) -> None:
    """Draws the measured shares, or the bytes of compiled steps.

    Args:
      files: reports written by --json, all with or all without --topology.
      plot: PNG to draw.

    Raises:
      UserError: a file is not such a report, or the reports are of both kinds or compare
        different competitors.
    """
    reports = [_read(file) for file in files]
    draw = _drawing(reports)
    with picture(plot, 6.5, 3.6, dpi=120) as figure:
        draw(figure.subplots(), reports)
    print(f"Written: {plot}")


def _read(file: epath.Path) -> Report:
    try:
        report = json.loads(file.read_text())
        if "shares" in report or "kernels" in report:
            return report
    except (OSError, ValueError, TypeError):
        pass
    raise UserError(
        f"{file} is not a report of `benchmark train` or `infer`; write one with --json"
    )


def _drawing(reports: list[Report]) -> Callable[[Any, list[Report]], None]:
    """The function that can draw all of the reports."""
    measured = ["shares" in report for report in reports]
    if not any(measured):
        return _draw_bytes
    if not all(measured):
        raise UserError(
            "some reports hold bytes of compiled steps and some measured shares; plot those with "
            "--topology and those without apart"
        )
    names = list(reports[0]["shares"])
    if any(list(report["shares"]) != names for report in reports):
        raise UserError(f"the reports compare others than {', '.join(names)}; measure them alike")
    return _draw_shares


def _draw_shares(axes: Any, reports: list[Report]) -> None:
    """Draws a group of bars per report: medians, with lines from the smallest to the largest."""
    names = list(reports[0]["shares"])
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        shares = [report["shares"][name]["share_of_peak"] for report in reports]
        median, least, largest = (
            np.array([share[key] for share in shares]) for key in ("median", "least", "largest")
        )
        where = np.arange(len(reports)) + (i - (len(names) - 1) / 2) * width
        errors = np.stack([median - least, largest - median])
        bars = axes.bar(where, median, 0.9 * width, yerr=errors, capsize=3, label=name)
        axes.bar_label(bars, fmt="%.2f", label_type="center", color="white")
    axes.set_xticks(range(len(reports)), [_setting(report) for report in reports])
    axes.set_ylabel("share of the matrix product's rate")
    machines = dict.fromkeys(f"{r['devices']}, {r['cores']} cores" for r in reports)
    axes.set_title("Measured on " + "; ".join(machines))
    axes.figure.legend(loc="outside lower center", ncols=len(names))


def _setting(report: Report) -> str:
    """Describes what was measured."""
    what = "training" if report["training"] else "inference"
    return f"{what}\n{report['model']}, batch {report['batch_size']}, {report['dtype']}"


def _draw_bytes(axes: Any, reports: list[Report]) -> None:
    """Draws a bar per report, grouped by model, with a line at each model's goal."""
    reports = sorted(reports, key=lambda r: (r["model"], -r["gigabytes_per_image"]))
    for place, report in enumerate(reports):
        size, goal = report["gigabytes_per_image"], report["goal_gigabytes_per_image"]
        axes.bar(place, size, 0.6, color="0.45" if report["kernels"] == "no" else "tab:blue")
        axes.annotate(
            f"{size:.2f} GB", (place, 0), (0, 6), textcoords="offset points", ha="center", color="w"
        )
        if goal:
            axes.hlines(goal, place - 0.5, place + 0.5, "tab:red", "dashed", label="goal")
    topologies = ", ".join(sorted({r["topology"] for r in reports}))
    axes.set(
        xticks=range(len(reports)),
        xticklabels=[f"{r['model']}\n{KERNELS[r['kernels']]}" for r in reports],
        ylabel="GB per image",
        title=f"Memory traffic of a train step, compiled for {topologies}",
    )
    lines, names = axes.get_legend_handles_labels()
    if lines:
        axes.legend(lines[:1], [f"{names[0]}: less than a plain ViT of the same FLOPs"])
    axes.margins(y=0.1)
