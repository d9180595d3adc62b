"""Turns the command line of main.py into one call of training or evaluation."""

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
from ml_collections import ConfigDict

from sret_jax import exit_status
from sret_jax.errors import UserError
from sret_jax.evaluation.checkpoint_evaluation import evaluate_checkpoint
from sret_jax.files import absolute, write_json
from sret_jax.parallel import distributed
from sret_jax.parallel.devices import start_devices
from sret_jax.parallel.distributed import AgreedError
from sret_jax.parallel.preemption import Preempted
from sret_jax.run.compilation_cache import keep_compiled
from sret_jax.run.loop import train
from sret_jax.settings.saved_config import CONFIG_FILE, START_FILE, Start, load_config
from sret_jax.weights.loading import split_step


def launch(values: flags.FlagValues) -> None:
    """Joins the other processes, then trains or evaluates as the flags specify.

    If asked to stop, the process exits with status 75.

    Raises:
      UserError: anything the user can fix.
    """
    distributed.initialize(
        values.coordinator,
        values.processes,
        values.process_id,
        start_timeout=values.start_timeout,
        peer_timeout=values.peer_timeout,
    )
    start_devices(keep_freed_memory=True)
    distributed.silence_gloo()
    try:
        with _no_peer_waits():
            _run(values)
    except Preempted as stopped:
        distributed.say(str(stopped))
        sys.exit(exit_status.PREEMPTED)


def _run(values: flags.FlagValues) -> None:
    config_flag: Any = values["config"]
    place = absolute(values.workdir or default_workdir(config_flag.config_filename))
    workdir, step = split_step(place)
    config, start = chosen_config(config_flag, workdir)
    keep_compiled(workdir)
    if values.mode == "train":
        if workdir != place:
            raise UserError(
                f"--workdir={place} names one step, but training continues from the newest; give "
                f"--workdir={workdir}, or start from these weights in another --workdir with "
                f"--config.init_from={place}"
            )
        report = train(config, workdir, start=start)
    else:
        report = evaluate_checkpoint(config, workdir, step)
    if values.json and distributed.is_leader():
        write_json(epath.Path(values.json), report)


def chosen_config(config_flag: Any, workdir: epath.Path) -> tuple[ConfigDict, Start | None]:
    """The config of this start, and the command line to store in the workdir.

    A run keeps the settings it was started with, unless a setting is given now. Without --config,
    the config stored in the workdir is used, if there is one. With the same --config as before, the
    config file and all settings given on earlier command lines are used; with another --config,
    that config alone. Settings on this command line always win.

    Args:
      config_flag: --config and its overrides.
      workdir: folder of the run.

    Raises:
      UserError: files in the workdir are damaged or do not have such settings.
    """
    given, typed = config_flag.value, dict(config_flag.override_values)
    start, earlier = Start(config_flag.config_filename, typed), Start.read(workdir)
    if not config_flag.present:
        saved = load_config(workdir, like=given)
        if saved is None:
            return given, start
        saved.update_from_flattened_dict(typed)
        distributed.say(f"Without --config, the settings are those of {workdir / CONFIG_FILE}.")
        return saved, earlier and earlier.with_overrides(typed)
    if earlier is None or not earlier.is_of(start.config):
        return given, start
    start = earlier.with_overrides(typed)
    try:
        given.update_from_flattened_dict(start.overrides)
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"{workdir / START_FILE} has settings that {start.config} lacks ({e}); move it away "
            "and give --config with all settings that the run should have"
        ) from e
    if kept := [
        f"--config.{name}={start.overrides[name]}" for name in start.overrides.keys() - typed
    ]:
        distributed.say(f"As when {workdir} was started: {' '.join(sorted(kept))}.")
    return given, start


@contextlib.contextmanager
def _no_peer_waits() -> Iterator[None]:
    """Ends a process that fails alone at once; otherwise it and its peers would wait forever."""
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
    """A config's folder: configs/sret_lt.py:unsliced,res=384 -> runs/sret_lt-unsliced-res384."""
    file, _, args = config_file.partition(":")
    words = [epath.Path(file).stem, *re.findall(r"[\w.]+", args.replace("=", ""))]
    return "runs/" + "-".join(words)
