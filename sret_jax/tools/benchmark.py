"""Measures speed, in ratios taken in one run.

python -m sret_jax.tools.benchmark input                        (photographs made on the spot)
python -m sret_jax.tools.benchmark input --images=DIR --json=FILE
"""

import argparse
import pathlib

from etils import epath

from sret_jax.cli import clear_errors, quiet_libraries


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sret_jax.tools.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_subparsers(dest="what", required=True)
    data = what.add_parser("input", help="the input pipeline against one of Pillow alone")
    data.add_argument("--images", type=pathlib.Path, help="folder of JPEGs; default: makes 1,000")
    data.add_argument("--samples", type=int, default=4000, help="images a pipeline and round")
    data.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    data.add_argument("--size", type=int, default=224, help="side of the views, in pixels")
    data.add_argument("--json", type=epath.Path, help="also write the figures here")
    args = parser.parse_args(argv)
    quiet_libraries()
    with clear_errors():
        from sret_jax.tools.input_benchmark import benchmark_input

        benchmark_input(
            folder=args.images,
            samples=args.samples,
            rounds=args.rounds,
            size=args.size,
            json_file=args.json,
        )


if __name__ == "__main__":
    main()
