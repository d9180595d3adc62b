"""The pictures of a study, and its document."""

import re
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from etils import epath

from sret_jax.errors import UserError
from sret_jax.files import write_text
from sret_jax.picture import picture
from sret_jax.study.design import Study
from sret_jax.study.tables import Records, read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEGIN, END = "<!-- tables: written by tools.study -->", "<!-- end of tables -->"
# Pictures by the end of their file's name: the claims whose arms they show.
AGAINST_MACS = {"loops": ("loops", "recursion"), "families": ("families",)}
IN_ROWS = {"distillation": ("distillation",)}


def write_docs(study: Study, results: epath.Path, docs: epath.Path, tables: str) -> list[str]:
    """Writes the tables between the markers of DOCS/study.md, and the pictures beside it.

    A picture without finished runs is left out.

    Args:
      study: the study.
      results: folder of the evidence.
      docs: folder of the documents.
      tables: the tables in Markdown.

    Returns:
      The files that were written.

    Raises:
      UserError: the document is missing or has no markers.
    """
    document = docs / "study.md"
    text = document.read_text() if document.exists() else ""
    if BEGIN not in text or END not in text:
        raise UserError(f"{document} needs the lines {BEGIN!r} and {END!r}, between which to write")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    write_text(document, f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}")
    records = read_records(results, study.arms)
    written = [str(document)]
    for name, claims in {**AGAINST_MACS, **IN_ROWS}.items():
        groups = [
            trained
            for claim in claims
            for group in (study.claims[claim].groups if claim in study.claims else ())
            if (trained := [arm for arm in group if records[arm]])
        ]
        if not groups:
            continue
        path = docs / f"study_{name}.png"
        with picture(path, 7.2, 4.2) as figure:
            axes = figure.subplots()
            (_against_macs if name in AGAINST_MACS else _in_rows)(axes, groups, records)
        written.append(str(path))
    return written


def _against_macs(axes: "Axes", groups: Sequence[Sequence[str]], records: Records) -> None:
    """Mean accuracy against MMACs, a colour for each group; bars of a standard deviation."""
    drawn: set[str] = set()
    for number, group in enumerate(groups):
        arms = [arm for arm in group if arm not in drawn]
        if not arms:
            continue
        drawn.update(arms)
        points = [_point(arm, records) for arm in arms]
        macs, means, deviations = zip(*points, strict=True)
        colour = f"C{number}"
        axes.errorbar(macs, means, deviations, fmt="o", color=colour, capsize=3, markersize=5)
        for arm, x, y in zip(arms, macs, means, strict=True):
            axes.annotate(
                arm,
                (x, y),
                xytext=(6, 4),
                textcoords="offset points",
                fontsize=8,
                color=colour,
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.margins(x=0.15, y=0.1)
    axes.set_xlabel("MMACs per image")
    axes.set_ylabel("test top-1 (%)")
    axes.grid(alpha=0.3)


def _in_rows(axes: "Axes", groups: Sequence[Sequence[str]], records: Records) -> None:
    """A row for each arm: a dot for each seed, and a line at their mean."""
    arms = [arm for group in groups for arm in group][::-1]
    for row, arm in enumerate(arms):
        values = [run.top1 for run in records[arm].values()]
        axes.plot(values, [row] * len(values), "o", color="C0", alpha=0.6)
        axes.plot([statistics.mean(values)] * 2, [row - 0.25, row + 0.25], color="C1", lw=2)
    axes.set_yticks(range(len(arms)), [re.sub("_", " ", arm) for arm in arms])
    axes.set_xlabel("test top-1 (%): a dot for each seed, and their mean")
    axes.grid(alpha=0.3, axis="x")


def _point(arm: str, records: Records) -> tuple[float, float, float]:
    """MMACs, mean accuracy and its standard deviation (0 for one seed)."""
    runs = list(records[arm].values())
    values = [run.top1 for run in runs]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return runs[0].result["macs"] / 1e6, statistics.mean(values), deviation
