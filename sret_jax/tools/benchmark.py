"""Measures speed, in ratios taken in one run.

python -m sret_jax.tools.benchmark input                        (photographs made on the spot)
python -m sret_jax.tools.benchmark input --images=DIR --json=FILE
python -m sret_jax.tools.benchmark checkpoint                   (the quickstart's state)
python -m sret_jax.tools.benchmark checkpoint --config=sret_s --folder=DIR --json=FILE
python -m sret_jax.tools.benchmark train --config=sret_t --config.batch_size=16
python -m sret_jax.tools.benchmark train --config=FILE --config.batch_size=128 --topology=v5e:1x1
python -m sret_jax.tools.benchmark infer --config=sret_t --config.batch_size=16
python -m sret_jax.tools.benchmark infer --config=FILE --config.model.dtype=float32 --against=torch
python -m sret_jax.tools.benchmark products --config=sret_t --against=torch
python -m sret_jax.tools.benchmark plot FILE FILE --plot=FILE.png
python -m sret_jax.tools.benchmark slicing --config=sret_t --config.batch_size=16
python -m sret_jax.tools.benchmark slicing --config=FILE --config.batch_size=128 --topology=v5e:1x1
python -m sret_jax.tools.benchmark remat --config=sret_t --plot=FILE.png
python -m sret_jax.tools.benchmark trace --config=sret_t --loops=10,100,1000
python -m sret_jax.tools.benchmark soft_labels --config=sret_lt:fkd
"""

import argparse
import os
import pathlib

from absl import flags
from etils import epath

from sret_jax.cli import (
    CONFIG_FLAGS,
    Parser,
    clear_errors,
    define_config,
    parse_flags,
    quiet_libraries,
)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser.of("benchmark", __doc__)
    what = parser.add_subparsers(dest="what", required=True)
    data = what.add_parser("input", help="the input pipeline against one of Pillow alone")
    data.add_argument("--images", type=pathlib.Path, help="folder of JPEGs; default: makes 1,000")
    data.add_argument("--samples", type=int, default=4000, help="images a pipeline and round")
    data.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    data.add_argument("--size", type=int, default=224, help="side of the views, in pixels")
    data.add_argument("--json", type=epath.Path, help="also write the figures here")
    data.set_defaults(run=run_input)
    saving = what.add_parser(
        "checkpoint",
        help="what saving costs of training, and on disk",
        epilog=CONFIG_FLAGS,
    )
    saving.add_argument(
        "--folder", default="runs/checkpoint_benchmark", help="a new one, deleted at the end"
    )
    saving.add_argument("--steps", type=int, default=100, help="of a window")
    saving.add_argument("--rounds", type=int, default=7, help="of which the median counts")
    saving.add_argument("--json", type=epath.Path, help="also write the figures here")
    saving.set_defaults(run=run_checkpoint)
    for name, title in (("train", "the train step"), ("infer", "inference")):
        step = what.add_parser(
            name,
            help=f"{title}, as a share of the rate of one large matrix product",
            epilog=CONFIG_FLAGS,
        )
        step.add_argument("--rounds", type=int, default=9, help="of which the median counts")
        step.add_argument("--steps", type=int, default=3, help="of a round, at least")
        step.add_argument("--json", type=epath.Path, help="also write the figures here")
        step.add_argument(
            "--against", choices=["torch"], help="measure this too: eager and compiled"
        )
        step.set_defaults(run=run_step)
        if name == "train":
            step.add_argument(
                "--topology", help="compile for v5e:1x1, say, and count bytes; measures nothing"
            )
    alone = what.add_parser(
        "products",
        help="the matrix products of a train step on a CPU, each by itself",
        epilog=CONFIG_FLAGS,
    )
    alone.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    alone.add_argument("--json", type=epath.Path, help="also write the figures here")
    alone.add_argument("--against", choices=["torch"], help="time PyTorch's, too")
    alone.set_defaults(run=run_products)
    plot = what.add_parser("plot", help="draws what train and infer wrote")
    plot.add_argument("files", nargs="+", type=epath.Path, help="their --json files")
    plot.add_argument("--plot", type=epath.Path, required=True, help="a PNG")
    plot.set_defaults(run=run_plot)
    slicing = what.add_parser(
        "slicing",
        help="what slicing saves: multiply-accumulates and time",
        epilog=CONFIG_FLAGS,
    )
    slicing.add_argument("--models", default="sret_t,sret_lt,sret_s", help="separated by commas")
    slicing.add_argument("--rounds", type=int, default=9, help="of which the median counts")
    slicing.add_argument("--steps", type=int, default=2, help="of a round, at least")
    slicing.add_argument("--topology", help="compile for v5e:1x1, say, and compare bytes instead")
    slicing.add_argument("--json", type=epath.Path, help="also write the figures here")
    slicing.set_defaults(run=run_slicing)
    remat = what.add_parser(
        "remat",
        help="temporaries against FLOPs of each model.remat",
        epilog=CONFIG_FLAGS,
    )
    remat.add_argument("--topology", default="local", help="v5e:1x1, say; default: this machine")
    remat.add_argument("--json", type=epath.Path, help="also write the figures here")
    remat.add_argument("--plot", type=epath.Path, help="also draw them in this PNG")
    remat.set_defaults(run=run_remat)
    tracing = what.add_parser(
        "trace",
        help="how tracing, lowering and the program grow with model.loops",
        epilog=CONFIG_FLAGS,
    )
    tracing.add_argument(
        "--loops",
        type=_numbers,
        default=[10, 100, 1000],
        help="of every block; default: 10,100,1000",
    )
    tracing.add_argument("--rounds", type=int, default=3, help="of which the least counts")
    tracing.add_argument("--json", type=epath.Path, help="also write the figures here")
    tracing.set_defaults(run=run_trace)
    labels = what.add_parser(
        "soft_labels",
        help="what stored soft labels cost the train step and the loader",
        epilog=CONFIG_FLAGS,
    )
    labels.add_argument("--rounds", type=int, default=9, help="of which the median counts")
    labels.add_argument("--steps", type=int, default=3, help="of a round, at least")
    labels.add_argument("--samples", type=int, default=2000, help="images a loader and round")
    labels.add_argument("--json", type=epath.Path, help="also write the figures here")
    labels.set_defaults(run=run_soft_labels)
    args, rest = parser.parse_known_args(argv)
    quiet_libraries()
    with clear_errors():
        args.run(parser, args, rest)


def run_input(parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]) -> None:
    """Measures the input pipeline."""
    from sret_jax.benchmarks.input_benchmark import benchmark_input

    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    benchmark_input(
        folder=args.images,
        samples=args.samples,
        rounds=args.rounds,
        size=args.size,
        json_file=args.json,
    )


def run_checkpoint(
    parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]
) -> None:
    """Measures the checkpoints; `rest` names the config."""
    parse_flags(define_config, [parser.prog, *rest])
    from sret_jax.benchmarks.checkpoint_benchmark import benchmark_checkpoint
    from sret_jax.files import absolute

    benchmark_checkpoint(
        flags.FLAGS.config,
        absolute(args.folder),
        steps=args.steps,
        rounds=args.rounds,
        json_file=args.json,
    )


def run_step(parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]) -> None:
    """Measures the train step or inference, or compiles for a TPU; `rest` names the config."""
    parse_flags(define_config, [parser.prog, *rest])
    if args.what == "train" and args.topology:
        _need_no_devices(args.topology)
        from sret_jax.benchmarks.compiled_bytes import benchmark_bytes

        benchmark_bytes(flags.FLAGS.config, args.topology, json_file=args.json)
        return
    _step_as_runs_do()
    from sret_jax.benchmarks.speed_benchmark import benchmark_step

    benchmark_step(
        flags.FLAGS.config,
        train=args.what == "train",
        rounds=args.rounds,
        steps=args.steps,
        against=args.against,
        json_file=args.json,
    )


def run_products(
    parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]
) -> None:
    """Times the products of the train step; `rest` names the config."""
    parse_flags(define_config, [parser.prog, *rest])
    _step_as_runs_do()
    from sret_jax.benchmarks.product_benchmark import benchmark_products

    benchmark_products(
        flags.FLAGS.config, rounds=args.rounds, against=args.against, json_file=args.json
    )


def run_plot(parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]) -> None:
    """Draws what earlier runs wrote."""
    from sret_jax.benchmarks.report_plot import plot_reports

    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    plot_reports(args.files, args.plot)


def run_slicing(parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]) -> None:
    """Compares models with their unsliced twins; `rest` names the config of the rest."""
    parse_flags(define_config, [parser.prog, *rest])
    if args.topology:
        _need_no_devices(args.topology)
    else:
        _step_as_runs_do()
    from sret_jax.benchmarks.slicing_benchmark import benchmark_slicing

    benchmark_slicing(
        flags.FLAGS.config,
        models=args.models.split(","),
        rounds=args.rounds,
        steps=args.steps,
        topology=args.topology,
        json_file=args.json,
    )


def run_remat(parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]) -> None:
    """Compiles with every remat choice; `rest` names the config."""
    parse_flags(define_config, [parser.prog, *rest])
    _need_no_devices(args.topology)
    from sret_jax.benchmarks.remat_benchmark import benchmark_remat

    benchmark_remat(flags.FLAGS.config, args.topology, json_file=args.json, plot=args.plot)


def run_trace(parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]) -> None:
    """Traces and lowers the train step; `rest` names the config."""
    parse_flags(define_config, [parser.prog, *rest])
    from sret_jax.benchmarks.trace_benchmark import benchmark_trace

    benchmark_trace(flags.FLAGS.config, loops=args.loops, rounds=args.rounds, json_file=args.json)


def run_soft_labels(
    parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]
) -> None:
    """Measures stored soft labels; `rest` names the config."""
    parse_flags(define_config, [parser.prog, *rest])
    from sret_jax.benchmarks.label_benchmark import benchmark_labels

    benchmark_labels(
        flags.FLAGS.config,
        rounds=args.rounds,
        steps=args.steps,
        samples=args.samples,
        json_file=args.json,
    )


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        example = "numbers separated by commas, such as 10,100,1000"
        raise argparse.ArgumentTypeError(f"{text!r} is not {example}") from None


def _need_no_devices(topology: str) -> None:
    """Leaves this machine's accelerators alone where a program is compiled for others."""
    if topology != "local":
        os.environ["JAX_PLATFORMS"] = "cpu"


def _step_as_runs_do() -> None:
    """Keeps freed memory, as main.py does, while no device was asked for: later is too late."""
    from sret_jax.parallel.freed_memory import keep_temporaries

    keep_temporaries()


if __name__ == "__main__":
    main()
