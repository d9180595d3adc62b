"""Draws the shares that `benchmark train` and `infer` measured, ours beside PyTorch's."""

import json

import numpy as np
from etils import epath

from sret_jax.errors import UserError


def plot_shares(files: list[epath.Path], plot: epath.Path) -> None:
    """Draws a group of bars for each report: medians, and lines from the least to the largest.

    Args:
      files: what --json wrote.
      plot: the PNG.

    Raises:
      UserError: a file that is no such report, or reports of different competitors.
    """
    reports = [_read(file) for file in files]
    names = list(reports[0]["shares"])
    if any(list(report["shares"]) != names for report in reports):
        raise UserError(f"the reports compare others than {', '.join(names)}; measure them alike")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
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
    titles = ["training" if report["training"] else "inference" for report in reports]
    axes.set_xticks(range(len(reports)), titles)
    axes.set_ylabel("share of the matrix product's rate")
    first = reports[0]
    axes.set_title(f"{first['model']}, batch {first['batch_size']}, {first['dtype']}, CPU")
    axes.legend()
    with plot.open("wb") as target:
        figure.savefig(target, format="png", dpi=120)
    print(f"Written: {plot}")


def _read(file: epath.Path) -> dict:
    try:
        report = json.loads(file.read_text())
        report["shares"], report["training"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{file} is no report of `benchmark train` or `infer` ({e}); write one with --json"
        ) from e
    return report
