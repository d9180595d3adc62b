"""Trains the arms of a study with several seeds, and prints its tables.

python -m sret_jax.tools.study --arms=loops1,loops2 --seeds=3 --jobs=2
python -m sret_jax.tools.study --data=FOLDER --arms=recursion
python -m sret_jax.tools.study --times
python -m sret_jax.tools.study --table
python -m sret_jax.tools.study --docs=docs

After an interruption, give the same command again; it continues where it was. Results go to
results/NAME_OF_THE_CONFIG/ARM/SEED, runs to runs/NAME_OF_THE_CONFIG/ARM/SEED.
"""

import argparse
import sys

from etils import epath

from sret_jax import exit_status
from sret_jax.cli import Parser, clear_errors, path_argument, quiet_libraries
from sret_jax.errors import UserError
from sret_jax.files import absolute, write_json
from sret_jax.study.design import TIMES, Place, Study
from sret_jax.study.pictures import write_docs
from sret_jax.study.records import read_times
from sret_jax.study.tables import report
from sret_jax.terminal import outlast_readers

CONFIG = "study_cifar10"


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = Parser.of("study", __doc__)
    parser.add_argument("--config", default=CONFIG, help=f"a study; default: {CONFIG}")
    parser.add_argument("--arms", default="", help="names of arms or claims; default: all arms")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each arm; default: 3")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at once; default: 1, as on an accelerator"
    )
    parser.add_argument("--full", action="store_true", help="longer training")
    parser.add_argument("--data", help="config.data.name: a TFDS data set or a folder")
    parser.add_argument("--data_dir", help="config.data.data_dir: folder of TFDS data")
    parser.add_argument("--runs", help="folder of the runs; default: runs/NAME_OF_THE_CONFIG")
    parser.add_argument("--results", type=path_argument, help="default: results/NAME_OF_...")
    parser.add_argument("--times", action="store_true", help="time the train steps; train nothing")
    parser.add_argument("--table", action="store_true", help="print the tables; train nothing")
    parser.add_argument("--docs", type=path_argument, help="write tables and pictures there")
    args = parser.parse_args(argv)
    quiet_libraries()
    with clear_errors():
        if args.times:
            _time(args)
        status = _tables(args) if args.table or args.docs else 0 if args.times else _train(args)
    if status:
        sys.exit(status)


def _tables(args: argparse.Namespace) -> int:
    """Prints the tables, and writes them and the pictures into documents."""
    study, results = _opened(args)
    if args.table:
        print(report(study, results), flush=True)
    if args.docs:
        for file in write_docs(study, results, args.docs):
            print(f"Written: {file}", flush=True)
    return 0


def _time(args: argparse.Namespace) -> None:
    """Times the train steps that are not timed yet, and writes times.json in the results."""
    from sret_jax.benchmarks.arm_times import time_arms  # loads JAX
    from sret_jax.parallel.freed_memory import keep_temporaries
    from sret_jax.study.evidence import processor

    keep_temporaries()
    study, results = _opened(args)
    times = read_times(study, results)
    for baseline, arms in study.timed().items():
        if times.get(baseline, {"arms": {}})["arms"].keys() >= set(arms):
            continue
        settings = {arm: study.settings(arm, 0) for arm in arms}
        group = time_arms(settings, study.classes)
        times[baseline] = {"processor": processor(), **group}
        results.mkdir(parents=True, exist_ok=True)
        write_json(results / TIMES, times)
        print(f"Timed: {', '.join(arms)}", flush=True)


def _train(args: argparse.Namespace) -> int:
    """Trains the runs that are not finished; returns the exit status."""
    from sret_jax.study.runs import train_runs  # loads JAX, which the tables do without

    if args.seeds < 1 or args.jobs < 1:
        raise UserError(f"--seeds={args.seeds} and --jobs={args.jobs} must be at least 1")
    study, results = _opened(args)
    data = {"data.name": args.data, "data.data_dir": args.data_dir}
    place = Place(
        args.runs or f"runs/{study.name}", {k: v for k, v in data.items() if v is not None}
    )
    arms = study.select([name for name in args.arms.split(",") if name])
    outcome = train_runs(study, place, study.runs(arms, args.seeds), results, args.jobs)
    if outcome.stopped:
        print("Stopped as asked; the same command continues.", flush=True)
        return exit_status.PREEMPTED
    if outcome.failed:
        print(f"{len(outcome.failed)} runs failed: {', '.join(outcome.failed)}", flush=True)
        return 1
    print(f"All runs are finished; results are in {results}.", flush=True)
    return 0


def _opened(args: argparse.Namespace) -> tuple[Study, epath.Path]:
    """The study, and the folder of its results."""
    study = Study.read(args.config, full=args.full)
    return study, args.results or absolute(f"results/{study.name}")


if __name__ == "__main__":
    outlast_readers()
    main()
