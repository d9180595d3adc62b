"""Evaluates runs with another number of loops than in training: accuracy against cost.

python -m sret_jax.tools.anytime RUN... --loops=1,2,3 --json=FILE.json --picture=FILE.png

Runs called NAME-0, NAME-1, ... that differ only in their seed share a row for each number of loops,
with their mean and standard deviation.
"""

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from sret_jax.cli import Parser, clear_errors, path_argument, quiet_libraries
from sret_jax.errors import UserError
from sret_jax.evaluation.checkpoint_evaluation import evaluate_weights
from sret_jax.files import write_json
from sret_jax.models.flops import model_macs
from sret_jax.picture import picture
from sret_jax.settings.saved_config import (
    CONFIG_FILE,
    changed_settings,
    is_converted,
    load_config,
)
from sret_jax.text import table

NUMBER = re.compile(r"(?<=.)[-_.]\d+$")  # the number at the end of a run's name
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = Parser.of("anytime", __doc__)
    parser.add_argument("workdirs", metavar="RUN", type=path_argument, nargs="+", help="a workdir")
    parser.add_argument("--loops", required=True, help="numbers of loops, e.g. 1,2,3")
    parser.add_argument("--json", type=path_argument, help="writes the rows to this file")
    parser.add_argument(
        "--picture", type=path_argument, help="draws accuracy against cost to this PNG"
    )
    args = parser.parse_args(argv)
    quiet_libraries()
    with clear_errors():
        rows = measure(args.workdirs, parse_loops(args.loops))
        print(accuracy_table(rows))
        if args.json:
            write_json(args.json, rows)
        if args.picture:
            draw(rows, args.picture)


def parse_loops(text: str) -> list[int]:
    """Parses a list such as "1,2,3".

    Raises:
      UserError: the text is not such a list.
    """
    if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", text):
        raise UserError(f"--loops={text} should read like --loops=1,2,3")
    return sorted({int(number) for number in text.split(",")})


def measure(workdirs: Sequence[epath.Path], loops: Sequence[int]) -> list[Row]:
    """Accuracies of the averaged weights (or raw weights if there are no others), by group of runs.

    Returns:
      [{"run": name of the group, "loops", "gmacs": per image, "top1": one fraction per run}].

    Raises:
      UserError: a workdir has no trained run, or its model cannot have that many loops.
    """
    configs = {workdir: _config_of(workdir) for workdir in workdirs}
    groups = group_names(configs)
    rows: dict[tuple[str, int], Row] = {}
    said: set[str] = set()

    def say_once(sentence: str) -> None:
        if sentence not in said:
            print(sentence, flush=True)
            said.add(sentence)

    for workdir, config in configs.items():
        group = groups[workdir]
        for number in loops:
            config.model.loops = number
            found = evaluate_weights(config, workdir, say=say_once)
            for remark in found.remarks:
                say_once(remark)
            gmacs = model_macs(found.model) / 1e9
            row: Row = {"run": group, "loops": number, "gmacs": gmacs, "top1": []}
            results = found.results.get("eval_ema", found.results["eval"])
            rows.setdefault((group, number), row)["top1"].append(results["top1"])
    return list(rows.values())


def group_names(configs: dict[epath.Path, ConfigDict]) -> dict[epath.Path, str]:
    """The name of each run's rows: the run's own name, or one shared by runs of several seeds.

    Runs in one folder share NAME if they are called NAME-0, NAME-1, ... and their configs differ
    only in the seed. If the configs differ in more, a printed sentence names the settings.
    """
    named: dict[epath.Path, list[epath.Path]] = {}
    for workdir in configs:
        named.setdefault(workdir.with_name(NUMBER.sub("", workdir.name)), []).append(workdir)
    groups: dict[epath.Path, epath.Path] = {}
    for name, (first, *others) in named.items():
        changed = set().union(*(changed_settings(configs[other], first) for other in others))
        if changed - {"seed"}:
            print(
                f"{', '.join(run.name for run in [first, *others])} differ in "
                f"{', '.join(sorted(changed - {'seed'}))}, so that each has its own rows."
            )
        alone = not others or changed - {"seed"}
        groups |= {run: run if alone else name for run in [first, *others]}
    times_used = Counter(group.name for group in set(groups.values()))
    return {
        run: group.name if times_used[group.name] == 1 else str(group)
        for run, group in groups.items()
    }


def _config_of(workdir: epath.Path) -> ConfigDict:
    config = load_config(workdir)
    if config is None or is_converted(config):
        raise UserError(f"{workdir} holds no {CONFIG_FILE} of a run; give the workdir of one")
    return config


def accuracy_table(rows: Sequence[Row]) -> str:
    """Formats the rows: mean accuracy, and +- the standard deviation if there are several runs."""
    unit, per_giga = _cost_unit(rows)
    lines = []
    for row in rows:
        spread = f" +- {100 * statistics.stdev(row['top1']):.2f}" if len(row["top1"]) > 1 else ""
        top1 = f"{100 * statistics.mean(row['top1']):.2f}%{spread}"
        lines.append((row["run"], str(row["loops"]), f"{row['gmacs'] * per_giga:.3g}", top1))
    return table(("run", "loops", unit, "top-1"), lines)


def _cost_unit(rows: Sequence[Row]) -> tuple[str, float]:
    """GMACs or MMACs, in which costs are easy to read, and how many of them a GMAC is."""
    return ("MMACs", 1e3) if max(row["gmacs"] for row in rows) < 1 else ("GMACs", 1)


def draw(rows: Sequence[Row], path: epath.Path) -> None:
    """Draws accuracy against cost per image: a line through the means, and a dot per run."""
    unit, per_giga = _cost_unit(rows)
    loops = ", ".join(str(number) for number in dict.fromkeys(row["loops"] for row in rows))
    with picture(path, 6, 4) as figure:
        axes = figure.subplots()
        for colour, run in enumerate(dict.fromkeys(row["run"] for row in rows)):
            own = [row for row in rows if row["run"] == run]
            costs = [row["gmacs"] * per_giga for row in own]
            means = [100 * statistics.mean(row["top1"]) for row in own]
            axes.plot(costs, means, color=f"C{colour}", label=run)
            for cost, row in zip(costs, own, strict=True):
                shares = [100 * share for share in row["top1"]]
                axes.plot([cost] * len(shares), shares, ".", color=f"C{colour}", alpha=0.6)
        axes.set_xlabel(f"{unit} per image; each line from left to right: {loops} loops")
        axes.set_ylabel("top-1 (%)")
        several = any(len(row["top1"]) > 1 for row in rows)
        axes.legend(frameon=False, title="mean of the runs (dots)" if several else None)


if __name__ == "__main__":
    main()
