"""From a config to checked parts: data, model, mesh, schedule.

What a config can get wrong is found here, before anything compiles.
"""

import dataclasses
import math
import os
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sret_jax.data import sources
from sret_jax.data.images import EvalTransform
from sret_jax.data.loader import check_batch_size, train_transform
from sret_jax.data.mixing import Mixing
from sret_jax.errors import UserError, did_you_mean
from sret_jax.files import is_remote
from sret_jax.models.sret import SReT, create_model
from sret_jax.parallel.distributed import agreed, is_leader
from sret_jax.parallel.mesh import host_count, make_mesh, state_shardings
from sret_jax.training.optimizer import make_optimizer, make_schedule
from sret_jax.training.state import TrainState, init_state
from sret_jax.training.step import abstract_batch, make_train_step

IMAGENET_IMAGES, IMAGENET_CLASSES = 1_281_167, 1000  # what synthetic data stand for
LARGEST_SEED = 2**32 - 1  # JAX drops the bits above
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Computation:
    """What a training run computes, on given devices; it knows neither data nor files.

    Attributes:
      config: as given.
      model: with as many classes as the config or the data say.
      mixing: the augmentation on the device.
      mesh: of all devices.
      steps_per_epoch: N / B, not rounded.
      total_steps: round(epochs * N / B).
      schedule: step -> learning rate.
      optimizer: AdamW, the rate left out.
      abstract_state, shardings: shapes of the state, and how it lies on the mesh.
    """

    config: ConfigDict
    model: SReT
    mixing: Mixing
    mesh: Mesh
    steps_per_epoch: float
    total_steps: int
    schedule: Callable[[int], Any]
    optimizer: optax.GradientTransformation
    abstract_state: TrainState
    shardings: TrainState

    @property
    def last_step(self) -> int:
        """Where this run ends: at total_steps, or earlier at config.stop_at_step."""
        return min(self.total_steps, self.config.stop_at_step or self.total_steps)

    def make_train_step(self) -> jax.stages.Wrapped:
        """The jitted step (state, batch) -> (state, metrics)."""
        return make_train_step(
            self.model,
            self.optimizer,
            self.mesh,
            self.shardings,
            schedule=self.schedule,
            seed=self.config.seed,
            mixing=self.mixing,
            ema_decay=self.config.ema_decay,
            grad_accum=self.config.grad_accum,
        )

    def trace_train_step(self) -> jax.stages.Traced:
        """The step for the shapes of this run, to be counted, or lowered and compiled."""
        batch = abstract_batch(self.config.batch_size, self.model.image_size)
        return self.make_train_step().trace(self.abstract_state, batch)

    def init_state(self) -> TrainState:
        """The fresh state, made in place on its devices."""
        init = jax.jit(
            lambda: init_state(self.model, self.optimizer, self.config.seed),
            out_shardings=self.shardings,
        )
        return init()


@dataclasses.dataclass(frozen=True)
class Experiment(Computation):
    """A training run, checked but not yet started.

    Attributes:
      workdir: where everything is written.
      train_source, eval_source: the data.
    """

    workdir: epath.Path
    train_source: sources.Source
    eval_source: sources.Source

    @property
    def eval_every(self) -> int:
        """Steps between evaluations."""
        return self._steps(self.config.eval_every_epochs)

    @property
    def save_every(self) -> int:
        """Steps between checkpoints."""
        return self._steps(self.config.checkpoint.every_epochs)

    @property
    def keep_every(self) -> int:
        """Steps between the checkpoints kept for good, a multiple of save_every; 0 for none."""
        checkpoint = self.config.checkpoint
        if not checkpoint.keep_every_epochs:
            return 0
        return self.save_every * max(
            1, round(checkpoint.keep_every_epochs / checkpoint.every_epochs)
        )

    def _steps(self, epochs: float) -> int:
        return max(1, round(epochs * self.steps_per_epoch))


def open_experiment(config: ConfigDict, workdir: epath.Path) -> Experiment:
    """Checks a config and opens what it names.

    Raises:
      UserError: one sentence on the first thing that is wrong.
    """
    check_numbers(config)
    check_writable(workdir)
    mesh = make_mesh(config.fsdp)
    check_settings(config, mesh)  # mistakes show before data is opened
    train_source = open_split(config, workdir, config.data.train_split)
    eval_source = open_split(config, workdir, config.data.eval_split)
    computation = build_computation(
        config,
        mesh,
        images=len(train_source),
        train_classes=len(train_source.class_names),
        classes=len(eval_source.class_names),
    )
    check_room(workdir, computation.abstract_state)
    return Experiment(
        **vars(computation), workdir=workdir, train_source=train_source, eval_source=eval_source
    )


def check_settings(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError for what is wrong whatever the data: batches, model, augmentation."""
    mixing, hosts = make_mixing(config), host_count(mesh)
    check_batch_size(
        "batch_size",
        config.batch_size,
        mesh.size,
        config.grad_accum,
        in_pairs=mixing.in_pairs,
        hosts=hosts,
    )
    check_batch_size("eval_batch_size", config.eval_batch_size, mesh.size, hosts=hosts)
    create_from_config(config, num_classes=1)
    train_transform(config.augment, config.model.image_size)
    EvalTransform(config.model.image_size, config.data.test_crop)


def build_computation(
    config: ConfigDict, mesh: Mesh, *, images: int, train_classes: int, classes: int
) -> Computation:
    """Builds what a run of a checked config computes.

    Args:
      config: as configs/common.py makes it.
      mesh: from `make_mesh`; its devices need not be there.
      images: in the training split.
      train_classes: in the training split, which mixing needs two of.
      classes: in the data, which the model has where the config does not say.

    Raises:
      UserError: the config does not fit the data.
    """
    model = build_model(config, classes)
    mixing = make_mixing(config)
    if mixing.in_pairs and train_classes < 2:
        raise UserError(
            f"{config.data.name} has {train_classes} class, and mixing needs two; "
            "set config.augment.mixup=0 and config.augment.cutmix=0"
        )
    steps_per_epoch = images / config.batch_size
    total_steps = max(1, round(config.epochs * steps_per_epoch))
    optimizer = make_optimizer(config.optim)
    abstract_state = jax.eval_shape(lambda: init_state(model, optimizer, config.seed))
    return Computation(
        config=config,
        model=model,
        mixing=mixing,
        mesh=mesh,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        schedule=make_schedule(config.optim, config.batch_size, steps_per_epoch, total_steps),
        optimizer=optimizer,
        abstract_state=abstract_state,
        shardings=state_shardings(abstract_state, mesh),
    )


def make_mixing(config: ConfigDict) -> Mixing:
    """The augmentation on the device."""
    return Mixing(
        **{field.name: config.augment[field.name] for field in dataclasses.fields(Mixing)}
    )


def open_split(config: ConfigDict, workdir: epath.Path, split: str) -> sources.Source:
    """Opens a split of config.data; process 0 first prepares the embedded digits if need be."""
    if config.data.synthetic:
        train = split == config.data.train_split
        length = IMAGENET_IMAGES if train else config.eval_batch_size
        return sources.SyntheticSource(length, config.model.num_classes or IMAGENET_CLASSES)
    name, data_dir = config.data.name, _data_dir(config, workdir)
    with agreed():
        if is_leader():
            sources.prepare_embedded(name, data_dir)
    return sources.open_source(name, split, data_dir)


def build_model(config: ConfigDict, classes: int) -> SReT:
    """The model of config.model, with as many classes as it says or else as the data have.

    Raises:
      UserError: sizes that do not fit, or labels beyond num_classes.
    """
    given = config.model.num_classes
    if given is not None and given < classes:
        raise UserError(
            f"{config.data.name} has labels up to {classes - 1}, beyond "
            f"config.model.num_classes={given}; set it to {classes}"
        )
    return create_from_config(config, classes if given is None else given)


def create_from_config(config: ConfigDict, num_classes: int) -> SReT:
    """The model of config.model, with that many classes.

    Raises:
      UserError: an unknown name or sizes that do not fit.
    """
    settings = {k: v for k, v in config.model.to_dict().items() if v is not None}
    name, dtype = settings.pop("name"), settings.pop("dtype")
    settings["num_classes"] = num_classes
    if dtype not in DTYPES:
        raise UserError(did_you_mean("config.model.dtype", dtype, DTYPES))
    try:
        return create_model(name, dtype=jnp.dtype(dtype).type, **settings)
    except ValueError as e:
        raise UserError(f"config.model: {e}") from e


def check_numbers(config: ConfigDict) -> None:
    """Raises UserError for a number out of range."""
    positive = (
        "epochs",
        "batch_size",
        "eval_batch_size",
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
    for name in ("stop_at_step", "model.num_classes"):
        if _get(config, name) is not None and _number(config, name) < 1:
            raise UserError(f"config.{name}={_get(config, name)} must be at least 1, or left out")
    for name in ("ema_decay", "data.max_bad_fraction"):
        if not 0 <= _number(config, name) < 1:
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
    """Makes the workdir.

    Raises:
      UserError: a process cannot write it, or the processes do not share it.
    """
    probe = workdir / ".probe"
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
    """Raises UserError where a local disk has no room for one checkpoint."""
    if is_remote(workdir):
        return
    checkpoint = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_state))
    free = shutil.disk_usage(workdir).free
    if free < checkpoint:
        raise UserError(
            f"the disk of the workdir {workdir} has {free / 1e6:.1f} MB left, and a checkpoint "
            f"takes {checkpoint / 1e6:.1f} MB; free some or give another --workdir"
        )


def _data_dir(config: ConfigDict, workdir: epath.Path) -> epath.Path | None:
    """Where TFDS looks; the embedded digits go to the workdir unless somewhere is named."""
    if config.data.data_dir:
        return epath.Path(config.data.data_dir).expanduser()
    if config.data.name == "digits" and "TFDS_DATA_DIR" not in os.environ:
        return workdir / "data"
    return None


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
