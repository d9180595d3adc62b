"""Plans a training run: what it needs and whether it fits, before any machine is rented.

python -m sret_jax.tools.plan --config=sret_s --topology=v5e:16x16
python -m sret_jax.tools.plan --config=sret_s --topology=v5e-256 --batch=4096
python -m sret_jax.tools.plan --config=sret_s --topology=v4-32 --find-batch
python -m sret_jax.tools.plan --config=sret_t --topology=local --json=FILE

It compiles the step that training would run, on a machine without a TPU (pip install -r
requirements-tpu.txt). Exit status 1: the step does not fit.
"""

import os

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

DOES_NOT_FIT = 1


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = Parser.of("plan", __doc__, epilog=CONFIG_FLAGS)
    parser.add_argument(
        "--topology", required=True, help="v5e:16x16, v5e-256, v4-32, ...; local: this machine"
    )
    parser.add_argument("--batch", type=int, help="global batch size instead of the config's")
    parser.add_argument(
        "--find-batch", action="store_true", help="find the largest batch that fits"
    )
    parser.add_argument("--json", type=path_argument, help="also write the figures here")
    args, rest = parser.parse_known_args(argv)
    quiet_libraries()
    parse_flags(define_config, [parser.prog, *rest])
    config = flags.FLAGS.config
    if args.batch is not None:
        config.batch_size = args.batch
    if args.topology != "local":
        os.environ["JAX_PLATFORMS"] = "cpu"  # this machine's accelerators are not needed
    with clear_errors():
        from sret_jax.planning.plan import plan

        report = plan(config, args.topology, find_batch=args.find_batch, json_file=args.json)
    return DOES_NOT_FIT if report["fits"] is False else 0


if __name__ == "__main__":
    raise SystemExit(main())
