"""Trains a model, or evaluates what was trained.

python main.py --config=sret_s --workdir=DIR
python main.py --mode=eval --workdir=DIR
"""

from absl import flags

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command line."""
    from sret_jax.cli import define_config

    define_config()
    flags.DEFINE_string("workdir", None, "Where results go; default: runs/NAME_OF_THE_CONFIG.")
    flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train, or evaluate what is in workdir.")
    flags.DEFINE_string("json", None, "Also write the figures printed at the end to this file.")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where JAX cannot tell.")
    flags.DEFINE_integer("processes", None, "How many run, where JAX cannot tell; 1: alone.")
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
    flags.DEFINE_integer("start_timeout", 300, "Seconds to wait for the other processes to join.")
    flags.DEFINE_integer("peer_timeout", 100, "Seconds after which a silent process ends the rest.")


def main(argv: list[str]) -> None:
    """One call, once the flags are read."""
    del argv
    if not FLAGS.process_id:
        print("Starting: loading JAX...", flush=True)
    # Mistakes on the command line are named before these are loaded.
    from sret_jax.cli import clear_errors, quiet_libraries
    from sret_jax.run.launch import launch

    if not FLAGS["verbosity"].present:
        quiet_libraries()
    with clear_errors():
        launch(FLAGS)


if __name__ == "__main__":
    from sret_jax.cli import run_app
    from sret_jax.config_files import configs_help

    run_app(main, define_flags, "train", f"{__doc__}\n{configs_help()}")
