"""The pictures of a study, and its document."""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from etils import epath

from sret_jax.errors import UserError
from sret_jax.files import write_text
from sret_jax.picture import picture
from sret_jax.study.design import Study
from sret_jax.study.records import Records, read_records
from sret_jax.study.tables import miniature, report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEGIN, END = "<!-- tables: written by tools.study -->", "<!-- end of tables -->"
# Pictures by the claim that they belong to, and the claims whose arms they show.
AGAINST_MACS = {"loops": ("loops", "recursion")}
IN_ROWS = {"distillation": ("distillation",), "families": ("families",)}
TICKS = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000)  # of the axis of MMACs


def write_docs(study: Study, results: epath.Path, docs: epath.Path) -> list[epath.Path]:
    """Writes the tables between the markers of the study's document, and the pictures beside it.

    Args:
      study: the study.
      results: folder of the evidence.
      docs: folder of the documents.

    Returns:
      The files that were written.

    Raises:
      UserError: the document is missing or has no markers, or evidence is damaged.
    """
    document = docs / f"{study.topic}.md"
    text = document.read_text() if document.exists() else ""
    if BEGIN not in text or END not in text:
        raise UserError(f"{document} needs the lines {BEGIN!r} and {END!r}, between which to write")
    pictures = draw_pictures(study, read_records(results, study.arms), docs)
    tables = report(study, results, {claim: path.name for claim, path in pictures.items()})
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    write_text(document, f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}")
    return [document, *pictures.values()]


def draw_pictures(study: Study, records: Records, folder: epath.Path) -> dict[str, epath.Path]:
    """Draws the pictures of claims with arms to compare; returns their paths by claim."""
    drawn = {}
    for name, claims in {**AGAINST_MACS, **IN_ROWS}.items():
        groups = [
            trained
            for claim in claims
            for group in (study.claims[claim].groups if claim in study.claims else ())
            if len(trained := [arm for arm in group if records[arm]]) > 1
        ]
        if not groups:
            continue
        drawn[name] = folder / f"{study.topic}_{name}.png"
        shown = [arm for group in groups for arm in group]
        height = max(3.6, 1.0 + 0.35 * len(shown)) if name in IN_ROWS else 4.2
        with picture(drawn[name], 7.2, height) as figure:
            axes = figure.subplots()
            axes.set_title(miniature(records, shown).strip("*."), fontsize=9)
            (_against_macs if name in AGAINST_MACS else _in_rows)(axes, groups, records)
    return drawn


def _against_macs(axes: "Axes", groups: Sequence[Sequence[str]], records: Records) -> None:
    """Mean accuracy against MMACs, a colour for each group; bars of a standard deviation."""
    from matplotlib.ticker import NullLocator

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
            text = dict(textcoords="offset points", fontsize=8, color=colour)
            axes.annotate(_caption(arm), (x, y), xytext=(6, -12 if number else 4), **text)  # type: ignore[arg-type]
    axes.set_xscale("log")
    axes.margins(x=0.2, y=0.1)
    left, right = axes.get_xlim()
    axes.set_xticks([tick for tick in TICKS if left <= tick <= 1.3 * right])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("MMACs per image")
    axes.set_ylabel("test top-1 (%)")
    axes.grid(alpha=0.3)


def _in_rows(axes: "Axes", groups: Sequence[Sequence[str]], records: Records) -> None:
    """A row for each arm: a dot for each seed, and a line at their mean."""
    arms = [arm for group in groups for arm in group]
    for row, arm in enumerate(arms):
        values = [run.top1 for run in records[arm].values()]
        colour = f"C{next(n for n, group in enumerate(groups) if arm in group)}"
        axes.plot(values, [row] * len(values), "o", color=colour, alpha=0.6)
        axes.plot([statistics.mean(values)] * 2, [row - 0.3, row + 0.3], color="black", lw=1.5)
    axes.set_yticks(range(len(arms)), map(_caption, arms))
    axes.invert_yaxis()
    axes.set_xlabel("test top-1 (%): a dot for each seed, and their mean")
    axes.grid(alpha=0.3, axis="x")


def _caption(arm: str) -> str:
    return arm.replace("_", " ")


def _point(arm: str, records: Records) -> tuple[float, float, float]:
    """MMACs, mean accuracy and its standard deviation (0 for one seed)."""
    runs = list(records[arm].values())
    values = [run.top1 for run in runs]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return runs[0].result["macs"] / 1e6, statistics.mean(values), deviation
