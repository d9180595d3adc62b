"""Checks of a config and a workdir that do not depend on the data: numbers and storage."""

import math
import secrets
import shutil
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from sret_jax.errors import UserError
from sret_jax.files import is_remote
from sret_jax.parallel.distributed import agreed, gather, is_leader
from sret_jax.training.state import TrainState

LARGEST_SEED = 2**32 - 1  # JAX drops higher bits


def check_numbers(config: ConfigDict) -> None:
    """Raises UserError if a number is out of range."""
    positive = (
        "epochs",
        "batch_size",
        "ema_images",
        "grad_accum",
        "log_every_steps",
        "eval_every_epochs",
        "checkpoint.every_epochs",
        "checkpoint.keep_latest",
        "rollback.bad_steps",
        "watchdog.factor",
        "watchdog.least_seconds",
        "watchdog.stop_seconds",
        "data.prefetch",
        "data.crops_per_image",
    )
    for name in positive:
        value = _number(config, name)
        if value <= 0:
            raise UserError(f"config.{name}={value} must be above 0")
    for name in (
        "seed",
        "augment.repeats",
        "optim.warmup_epochs",
        "optim.weight_decay",
        "optim.clip_norm",
        "rollback.most",
    ):
        if _number(config, name) < 0:
            raise UserError(f"config.{name}={_get(config, name)} must be 0 or more")
    if config.seed > LARGEST_SEED:
        raise UserError(f"config.seed={config.seed} must be at most {LARGEST_SEED}")
    for name in ("stop_at_step", "eval_batch_size", "model.num_classes"):
        if _get(config, name) is not None and _number(config, name) < 1:
            raise UserError(f"config.{name}={_get(config, name)} must be at least 1, or left out")
    for name in ("optim.layer_decay", "optim.backbone_lr"):
        if not 0 < _number(config, name) <= 1:
            raise UserError(f"config.{name}={_get(config, name)} must be in (0, 1]")
    if config.optim.freeze_backbone and not config.init_from:
        raise UserError(
            "config.optim.freeze_backbone=True leaves the rest of the model as it was initialised; "
            "give trained weights with config.init_from=PATH"
        )
    for name in ("ema_decay", "data.max_bad_fraction"):
        if _get(config, name) is not None and not 0 <= _number(config, name) < 1:
            raise UserError(f"config.{name}={_get(config, name)} must be in [0, 1)")
    profile = tuple(config.profile)
    whole = all(isinstance(step, int) for step in profile)
    if profile and not (whole and len(profile) == 2 and 1 <= profile[0] <= profile[1]):
        raise UserError(
            f"config.profile={profile} must be () or (first, last), two ascending steps from 1"
        )
    if _number(config, "data.workers") < -1:
        raise UserError(f"config.data.workers={config.data.workers} must be -1, 0 or more")


def check_writable(workdir: epath.Path) -> None:
    """Creates the workdir and checks it.

    Raises:
      UserError: a process cannot write to it, or the processes do not share it.
    """
    with agreed():
        pass  # raises if another process has failed before
    name = int(gather(secrets.randbelow(2**31))[0])  # chosen by process 0; other runs may check too
    probe = workdir / f".probe-{name:08x}"
    with agreed():
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if is_leader():
                probe.write_text("")
        except OSError as e:
            raise UserError(
                f"the workdir {workdir} is not writable ({e.strerror or e}); give another --workdir"
            ) from e
    with agreed():
        if not probe.exists():
            raise UserError(
                f"the workdir {workdir} is not the folder that process 0 sees; give a --workdir on "
                "storage that all hosts share"
            )
    if is_leader():
        probe.unlink(missing_ok=True)


def check_room(workdir: epath.Path, abstract_state: TrainState) -> None:
    """Raises UserError if the workdir is on a local disk without room for one checkpoint."""
    if is_remote(workdir):
        return
    checkpoint = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_state))
    free = shutil.disk_usage(workdir).free
    if free < checkpoint:
        raise UserError(
            f"the disk of the workdir {workdir} has {free / 1e6:.1f} MB left, and a checkpoint "
            f"takes {checkpoint / 1e6:.1f} MB; free some or give another --workdir"
        )


def _number(config: ConfigDict, name: str) -> float:
    value = _get(config, name)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"config.{name}={value} must be a number")
    return value


def _get(config: ConfigDict, name: str) -> Any:
    value: Any = config
    for key in name.split("."):
        value = value[key]
    return value
