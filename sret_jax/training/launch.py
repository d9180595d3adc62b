"""From the command line of main.py to one call of training or evaluation."""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags
from etils import epath

from sret_jax import exit_status
from sret_jax.errors import UserError
from sret_jax.files import absolute, write_json
from sret_jax.parallel import distributed
from sret_jax.parallel.devices import start_devices
from sret_jax.parallel.distributed import AgreedError
from sret_jax.parallel.preemption import Preempted
from sret_jax.training.checkpoint_evaluation import evaluate_checkpoint
from sret_jax.training.compilation_cache import keep_compiled
from sret_jax.training.loop import train
from sret_jax.training.saved_config import load_config


def launch(values: flags.FlagValues) -> None:
    """Joins the other processes, then trains or evaluates as the flags say.

    Asked to stop, it exits with status 75.

    Evaluating without --config takes the config saved in the workdir; single settings are
    overridden in any case.

    Raises:
      UserError: whatever the user can mend.
    """
    distributed.initialize(
        values.coordinator,
        values.processes,
        values.process_id,
        start_timeout=values.start_timeout,
        peer_timeout=values.peer_timeout,
    )
    start_devices(keep_freed_memory=True)
    try:
        with _no_peer_waits():
            _run(values)
    except Preempted as stopped:
        if distributed.is_leader():
            print(stopped, flush=True)
        sys.exit(exit_status.PREEMPTED)


def _run(values: flags.FlagValues) -> None:
    config_flag: Any = values["config"]
    workdir = absolute(values.workdir or default_workdir(config_flag.config_filename))
    config = values.config
    keep_compiled(workdir)
    if values.mode == "train":
        report = train(config, workdir)
    else:
        saved = None if config_flag.present else load_config(workdir, like=config)
        if saved is not None:
            saved.update_from_flattened_dict(config_flag.override_values)
        report = evaluate_checkpoint(saved or config, workdir)
    if values.json and distributed.is_leader():
        write_json(epath.Path(values.json), report)


@contextlib.contextmanager
def _no_peer_waits() -> Iterator[None]:
    """Ends a process that fails alone at once; else it and the others wait for each other."""
    try:
        yield
    except (AgreedError, Preempted):
        raise
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, UserError):
            print(f"Error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_status.BAD_INPUT if isinstance(error, UserError) else 1)


def default_workdir(config_file: str) -> str:
    """configs/sret_lt.py:unsliced,res=384 -> runs/sret_lt-unsliced-res384."""
    file, _, args = config_file.partition(":")
    words = [epath.Path(file).stem, *re.findall(r"[\w.]+", args.replace("=", ""))]
    return "runs/" + "-".join(words)
