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
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from absl import flags

from sret_jax.cli import (
    CONFIG_FLAGS,
    Parser,
    clear_errors,
    define_config,
    parse_flags,
    path_argument,
    quiet_libraries,
)

Option = tuple[str, dict[str, Any]]  # a flag, and how argparse reads it


class Benchmark(NamedTuple):
    """A command.

    Attributes:
      function: the function that measures, MODULE:NAME in sret_jax.benchmarks. Its arguments are
        the config, the options and `arguments`.
      title: description in --help.
      options: all options of the command.
      arguments: further arguments of the function.
      takes_config: whether the function takes a config.
    """

    function: str
    title: str
    options: tuple[Option, ...]
    arguments: Mapping[str, Any] = MappingProxyType({})
    takes_config: bool = True


def _option(flag: str, text: str, **settings: Any) -> Option:
    return flag, {"help": text, **settings}


def _rounds(default: int, text: str = "rounds; medians are reported") -> Option:
    return _option("--rounds", text, type=int, default=default)


def _steps(default: int, text: str = "steps per round, at least") -> Option:
    return _option("--steps", text, type=int, default=default)


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        example = "numbers separated by commas, such as 10,100,1000"
        raise argparse.ArgumentTypeError(f"{text!r} is not {example}") from None


JSON = _option("--json", "also write the figures here", dest="json_file", type=path_argument)
AGAINST = _option("--against", "measure PyTorch too", choices=["torch"])
BENCHMARKS = {
    "input": Benchmark(
        "input_benchmark:benchmark_input",
        "the input pipeline against one of Pillow alone",
        (
            _option(
                "--images",
                "folder of JPEGs; default: makes 1,000",
                dest="folder",
                type=pathlib.Path,
            ),
            _option("--samples", "images per pipeline and round", type=int, default=4000),
            _rounds(3),
            _option("--size", "side of the views, in pixels", type=int, default=224),
            JSON,
        ),
        takes_config=False,
    ),
    "checkpoint": Benchmark(
        "checkpoint_benchmark:benchmark_checkpoint",
        "the delay of training and the disk space of checkpoints",
        (
            _option(
                "--folder",
                "new folder, deleted at the end",
                type=path_argument,
                default="runs/checkpoint_benchmark",
            ),
            _steps(100, "steps per window"),
            _rounds(7),
            JSON,
        ),
    ),
    "train": Benchmark(
        "speed_benchmark:benchmark_step",
        "the train step, as a share of the rate of one large matrix product",
        (
            _rounds(9),
            _steps(3),
            AGAINST,
            _option("--topology", "compile for v5e:1x1, say, and count bytes; measures nothing"),
            JSON,
        ),
        {"train": True},
    ),
    "infer": Benchmark(
        "speed_benchmark:benchmark_step",
        "inference, as a share of the rate of one large matrix product",
        (_rounds(9), _steps(3), AGAINST, JSON),
        {"train": False},
    ),
    "products": Benchmark(
        "product_benchmark:benchmark_products",
        "the matrix products of a train step on a CPU, each by itself",
        (_rounds(3), AGAINST, JSON),
    ),
    "plot": Benchmark(
        "report_plot:plot_reports",
        "draw reports of train and infer",
        (
            _option("files", "their --json files", nargs="+", type=path_argument),
            _option("--plot", "a PNG", type=path_argument, required=True),
        ),
        takes_config=False,
    ),
    "slicing": Benchmark(
        "slicing_benchmark:benchmark_slicing",
        "what slicing saves: multiply-accumulates and time",
        (
            _option(
                "--models",
                "names separated by commas",
                type=lambda text: text.split(","),
                default="sret_t,sret_lt,sret_s",
            ),
            _rounds(9),
            _steps(2),
            _option("--topology", "compile for v5e:1x1, say, and compare bytes instead"),
            JSON,
        ),
    ),
    "remat": Benchmark(
        "remat_benchmark:benchmark_remat",
        "temporaries against FLOPs of each model.remat",
        (
            _option("--topology", "v5e:1x1, say; default: this machine", default="local"),
            _option("--plot", "also draw them in this PNG", type=path_argument),
            JSON,
        ),
    ),
    "trace": Benchmark(
        "trace_benchmark:benchmark_trace",
        "how tracing, lowering and the program grow with model.loops",
        (
            _option(
                "--loops",
                "numbers of loops per block; default: 10,100,1000",
                type=_numbers,
                default="10,100,1000",
            ),
            _rounds(3, "rounds; the smallest time is reported"),
            JSON,
        ),
    ),
    "soft_labels": Benchmark(
        "label_benchmark:benchmark_labels",
        "what stored soft labels cost the train step and the loader",
        (
            _rounds(9),
            _steps(3),
            _option("--samples", "images per loader and round", type=int, default=2000),
            JSON,
        ),
    ),
}


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = Parser.of("benchmark", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, one in BENCHMARKS.items():
        epilog = CONFIG_FLAGS if one.takes_config else None
        command = commands.add_parser(name, help=one.title, epilog=epilog)
        for flag, settings in one.options:
            command.add_argument(flag, **settings)
    args, rest = parser.parse_known_args(argv)
    arguments = vars(args)
    name = arguments.pop("command")
    chosen = BENCHMARKS[name]
    quiet_libraries()
    config = []
    if chosen.takes_config:
        parse_flags(define_config, [parser.prog, *rest])
        config = [flags.FLAGS.config]
        _prepare_process(arguments.get("topology"))
    elif rest:
        commands.choices[name].error(f"unrecognized arguments: {' '.join(rest)}")
    with clear_errors():
        measure = pkgutil.resolve_name(f"sret_jax.benchmarks.{chosen.function}")
        measure(*config, **arguments, **chosen.arguments)


def _prepare_process(topology: str | None) -> None:
    """Keeps freed memory as main.py does, or leaves this machine's accelerators unused."""
    if topology in (None, "local"):
        from sret_jax.parallel.freed_memory import keep_temporaries

        keep_temporaries()  # now: it has no effect after a device was used
    else:
        os.environ["JAX_PLATFORMS"] = "cpu"  # compiles for devices that need not exist here


if __name__ == "__main__":
    main()
