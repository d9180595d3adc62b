"""Compares groups of finished runs that differ in their seeds: a table and a picture of curves.

python -m sret_jax.tools.compare --runs hard runs/hard-* --runs soft runs/soft-* --picture=FILE.png

The spread is the standard deviation over the runs of a group, with n - 1 in the denominator.
"""

import dataclasses
import json
import statistics

from etils import epath

from sret_jax.cli import Parser, clear_errors, path_argument, quiet_libraries
from sret_jax.errors import UserError
from sret_jax.files import absolute
from sret_jax.picture import picture
from sret_jax.run.metrics_file import read_metrics
from sret_jax.run.report import RESULT_FILE
from sret_jax.text import markdown_table

CURVE = "eval/top1"


@dataclasses.dataclass(frozen=True)
class Group:
    """Finished runs that differ only in their seeds.

    Attributes:
      name: name of the group.
      top1, ema_top1: test accuracies at the end of each run, in percent.
      curves: for each run, {step: test accuracy in percent}.
    """

    name: str
    top1: list[float]
    ema_top1: list[float]
    curves: list[dict[float, float]]


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = Parser.of("compare", __doc__)
    parser.add_argument(
        "--runs",
        metavar=("NAME", "WORKDIR"),
        nargs="+",
        action="append",
        required=True,
        help="name and workdirs of a group of finished runs",
    )
    parser.add_argument("--picture", type=path_argument, help="PNG to draw the curves in")
    args = parser.parse_args(argv)
    quiet_libraries()
    with clear_errors():
        groups = [read_group(name, workdirs) for name, *workdirs in args.runs]
        print(accuracy_table(groups))
        if args.picture:
            draw(groups, args.picture)
            print(f"Written: {args.picture}")


def read_group(name: str, workdirs: list[epath.PathLike]) -> Group:
    """Reads the runs of one group.

    Raises:
      UserError: there are no runs, or one has not finished.
    """
    if not workdirs:
        raise UserError(f"--runs {name} names no workdir; write --runs NAME WORKDIR...")
    results = [_result(workdir) for workdir in map(absolute, workdirs)]
    top1, ema_top1 = (
        [100 * result[weights]["top1"] for result in results] for weights in ("eval", "eval_ema")
    )
    curves = [
        {line["step"]: 100 * line[CURVE] for line in read_metrics(workdir) if CURVE in line}
        for workdir in map(absolute, workdirs)
    ]
    return Group(name, top1, ema_top1, curves)


def accuracy_table(groups: list[Group]) -> str:
    """Formats the accuracies as a Markdown table, one row per group."""
    rows = [
        (
            group.name,
            str(len(group.top1)),
            _spread(group.top1),
            f"{min(group.top1):.2f} to {max(group.top1):.2f}",
            _spread(group.ema_top1),
        )
        for group in groups
    ]
    return markdown_table(("", "runs", "test top-1 (%)", "least to largest", "EMA"), rows)


def draw(groups: list[Group], path: epath.Path) -> None:
    """Draws each group's mean test accuracy by step, in a band from smallest to largest."""
    with picture(path, 6.4, 3.8) as figure:
        axes = figure.subplots()
        for group in groups:
            steps = sorted(set.intersection(*(set(curve) for curve in group.curves)))
            values = [[curve[step] for curve in group.curves] for step in steps]
            axes.plot(steps, list(map(statistics.mean, values)), marker=".", label=group.name)
            axes.fill_between(steps, list(map(min, values)), list(map(max, values)), alpha=0.2)
        axes.set_xlabel("step")
        axes.set_ylabel("test top-1 (%)")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="lower right")


def _result(workdir: epath.Path) -> dict:
    try:
        return json.loads((workdir / RESULT_FILE).read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{workdir} holds no finished run ({e}); let it end first") from e


def _spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


if __name__ == "__main__":
    main()
