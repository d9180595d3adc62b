"""Evaluates runs with other numbers of loops: accuracy against cost.

python -m sret_jax.tools.anytime RUN... --loops=1,2,3 --json=FILE.json --picture=FILE.png
python -m sret_jax.tools.anytime RUN... --loops=1,2,3 --exit=entropy,stable --choose_on=train[90%:]

With --exit, images leave the last block by a rule, each after its own number of loops: entropy,
confidence, stable or residual. Thresholds are drawn as a line of accuracy against mean cost on the
evaluation split. One is chosen on --choose_on, a part of the training split that training did not
see: the cheapest that loses at most --lose points of accuracy there.
Runs called NAME-0, NAME-1, ... that differ only in their seed share a row for each number of loops,
with their mean and standard deviation.
"""

import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from sret_jax.cli import Parser, clear_errors, path_argument, quiet_libraries
from sret_jax.errors import UserError, did_you_mean
from sret_jax.evaluation.checkpoint_evaluation import evaluate_weights
from sret_jax.evaluation.exits import Outcome, SplitExits, check_unseen, signals_of_split
from sret_jax.files import write_json
from sret_jax.models.flops import model_macs
from sret_jax.models.halting import KINDS
from sret_jax.picture import picture
from sret_jax.settings.saved_config import (
    CONFIG_FILE,
    changed_settings,
    is_converted,
    load_config,
)
from sret_jax.text import table

NUMBER = re.compile(r"(?<=.)[-_.]\d+$")  # the number at the end of a run's name
CURVE_STEP = 5  # every so many candidates for a threshold are drawn
Row = dict[str, Any]
Configs = Mapping[epath.Path, ConfigDict]


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = Parser.of("anytime", __doc__)
    parser.add_argument("workdirs", metavar="RUN", type=path_argument, nargs="+", help="a workdir")
    parser.add_argument("--loops", required=True, help="numbers of loops, e.g. 1,2,3")
    parser.add_argument("--exit", metavar="RULES", help="rules of exit per image, e.g. entropy")
    parser.add_argument("--choose_on", metavar="SPLIT", help="split to choose thresholds on")
    parser.add_argument(
        "--lose",
        type=float,
        default=0.3,
        metavar="POINTS",
        help="accuracy to give up; default: 0.3",
    )
    parser.add_argument("--json", type=path_argument, help="writes the rows to this file")
    parser.add_argument(
        "--picture", type=path_argument, help="draws accuracy against cost to this PNG"
    )
    args = parser.parse_args(argv)
    quiet_libraries()
    with clear_errors():
        loops, kinds = parse_loops(args.loops), parse_rules(args.exit, args.choose_on)
        configs = {workdir: _config_of(workdir) for workdir in args.workdirs}
        for workdir, config in configs.items() if kinds else ():
            check_unseen(config, workdir, args.choose_on)
        groups = group_names(configs)
        rows = measure(configs, groups, loops)
        print(accuracy_table(rows))
        exits = []
        if kinds:
            exits = measure_exits(configs, groups, kinds, args.choose_on, args.lose)
            print(exit_table(exits, args.choose_on, args.lose))
        if args.json:
            write_json(args.json, rows + exits)
        if args.picture:
            draw(rows, args.picture, exits)


def parse_loops(text: str) -> list[int]:
    """Parses a list such as "1,2,3".

    Raises:
      UserError: the text is not such a list.
    """
    if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", text):
        raise UserError(f"--loops={text} should read like --loops=1,2,3")
    return sorted({int(number) for number in text.split(",")})


def parse_rules(text: str | None, choose_on: str | None) -> list[str]:
    """Parses a list such as "entropy,stable".

    Raises:
      UserError: there is no such rule, or no split to choose its threshold on.
    """
    kinds = text.split(",") if text else []
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(did_you_mean("rule in --exit", kind, KINDS))
    if bool(kinds) != bool(choose_on):
        raise UserError(
            "--exit and --choose_on belong together: thresholds are chosen on images that the run "
            "was neither trained nor is evaluated on; give e.g. --exit=entropy "
            "--choose_on=train[90%:] for a run with --config.data.train_split=train[:90%]"
        )
    return kinds


def measure(configs: Configs, groups: Mapping[epath.Path, str], loops: Sequence[int]) -> list[Row]:
    """Accuracies of the averaged weights (or raw weights if there are no others), by group of runs.

    Args:
      configs: configs of the runs, by workdir.
      groups: names of their groups; see `group_names`.
      loops: numbers of loops.

    Returns:
      [{"run": name of the group, "loops", "gmacs": per image, "top1": one fraction per run}].

    Raises:
      UserError: a workdir has no trained run, or its model cannot have that many loops.
    """
    rows: dict[tuple[str, int], Row] = {}
    said: set[str] = set()

    def say_once(sentence: str) -> None:
        if sentence not in said:
            print(sentence, flush=True)
            said.add(sentence)

    for workdir, run_config in configs.items():
        group, config = groups[workdir], run_config.copy_and_resolve_references()
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


def measure_exits(
    configs: Configs,
    groups: Mapping[epath.Path, str],
    kinds: Sequence[str],
    choose_on: str,
    lose: float,
) -> list[Row]:
    """Accuracies and costs of exit per image, by group of runs and kind of rule.

    Args:
      configs: configs of the runs, by workdir.
      groups: names of their groups; see `group_names`.
      kinds: kinds of rules; see `ExitRule`.
      choose_on: the split that thresholds are chosen on.
      lose: points of accuracy that the chosen rule may lose there against all loops.

    Returns:
      [{"run": name of the group, "exit": kind, "runs": one of `_exits_of_run` per run}].

    Raises:
      UserError: a workdir has no trained run, or no image can leave its model early.
    """
    rows: dict[tuple[str, str], Row] = {}
    for workdir, config in configs.items():
        held_out, test = (
            signals_of_split(config, workdir, split, print)
            for split in (choose_on, config.data.eval_split)
        )
        for kind in kinds:
            row: Row = {"run": groups[workdir], "exit": kind, "runs": []}
            row = rows.setdefault((groups[workdir], kind), row)
            row["runs"].append(_exits_of_run(held_out, test, kind, lose / 100))
    return list(rows.values())


def _exits_of_run(held_out: SplitExits, test: SplitExits, kind: str, lose: float) -> Row:
    """The chosen rule of a run, all loops, and all thresholds, on the evaluation split.

    Returns:
      {"chosen": None if all candidates lose more, "all_loops", "curve": list}, each entry
      {"rule", "loops": mean, "gmacs": mean per image, "top1"}.
    """
    chosen = held_out.cheapest(kind, lose)
    return {
        "chosen": _entry(test.outcome(chosen)) if chosen else None,
        "all_loops": _entry(test.full()),
        "curve": [_entry(test.outcome(rule)) for rule in held_out.candidates(kind)[::CURVE_STEP]],
    }


def _entry(outcome: Outcome) -> Row:
    rule = str(outcome.rule) if outcome.rule else "all loops"
    return {
        "rule": rule,
        "loops": outcome.loops,
        "gmacs": outcome.macs / 1e9,
        "top1": outcome.top1,
    }


def group_names(configs: Configs) -> dict[epath.Path, str]:
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


def exit_table(rows: Sequence[Row], choose_on: str, lose: float) -> str:
    """Formats the chosen rules: what they lose and save against all loops, one line per run."""
    lines = []
    for row in rows:
        for run in row["runs"]:
            chosen, full = run["chosen"], run["all_loops"]
            if not chosen:
                lines.append((row["run"], f"{row['exit']}: none loses so little", *[""] * 4))
                continue
            lines.append(
                (
                    row["run"],
                    chosen["rule"],
                    f"{chosen['loops']:.2f}",
                    f"{100 * (chosen['gmacs'] / full['gmacs'] - 1):+.1f}%",
                    f"{100 * chosen['top1']:.2f}%",
                    f"{100 * (chosen['top1'] - full['top1']):+.2f}",
                )
            )
    headings = ("run", "exit", "loops", "MACs", "top-1", "points")
    return (
        f"Exit per image: the cheapest threshold that loses at most {lose:g} points on "
        f"{choose_on}, against all loops on the evaluation split. MACs are those up to an image's "
        f"own exit; a batch is computed until its last image has left.\n{table(headings, lines)}"
    )


def _cost_unit(rows: Sequence[Row]) -> tuple[str, float]:
    """GMACs or MMACs, in which costs are easy to read, and how many of them a GMAC is."""
    return ("MMACs", 1e3) if max(row["gmacs"] for row in rows) < 1 else ("GMACs", 1)


def draw(rows: Sequence[Row], path: epath.Path, exits: Sequence[Row] = ()) -> None:
    """Draws accuracy against cost per image: a line through the means, and a dot per run.

    Args:
      rows: of fixed numbers of loops.
      path: path of the PNG.
      exits: of exit per image: a dashed line through the means over thresholds, and a cross for the
        chosen threshold of each run.
    """
    unit, per_giga = _cost_unit(rows)
    loops = ", ".join(str(number) for number in dict.fromkeys(row["loops"] for row in rows))
    with picture(path, 6, 4) as figure:
        axes = figure.subplots()
        runs = list(dict.fromkeys(row["run"] for row in rows))
        for colour, run in enumerate(runs):
            own = [row for row in rows if row["run"] == run]
            costs = [row["gmacs"] * per_giga for row in own]
            means = [100 * statistics.mean(row["top1"]) for row in own]
            axes.plot(costs, means, color=f"C{colour}", label=run)
            for cost, row in zip(costs, own, strict=True):
                shares = [100 * share for share in row["top1"]]
                axes.plot([cost] * len(shares), shares, ".", color=f"C{colour}", alpha=0.6)
        for line, row in enumerate(exits):
            curves = [run["curve"] for run in row["runs"]]
            costs, means = (
                [statistics.mean(entry[key] for entry in at) for at in zip(*curves, strict=True)]
                for key in ("gmacs", "top1")
            )
            drawn = f"C{len(runs) + line}"
            axes.plot(
                [cost * per_giga for cost in costs],
                [100 * mean for mean in means],
                "--" if len(costs) > 1 else "s",
                color=drawn,
                label=f"{row['run']}, exit by {row['exit']}",
            )
            for chosen in (run["chosen"] for run in row["runs"] if run["chosen"]):
                axes.plot(chosen["gmacs"] * per_giga, 100 * chosen["top1"], "x", color=drawn)
        axes.set_xlabel(f"{unit} per image; each solid line from left to right: {loops} loops")
        axes.set_ylabel("top-1 (%)")
        several = any(len(row["top1"]) > 1 for row in rows)
        axes.legend(frameon=False, title="mean of the runs (dots)" if several else None)


if __name__ == "__main__":
    main()
