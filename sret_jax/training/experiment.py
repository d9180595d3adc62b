"""Builds the checked parts of a run from its config: data, model, mesh, schedule.

Errors in a config are found here, before anything compiles.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sret_jax.checkpoints.reading import has_checkpoints
from sret_jax.data.loader import (
    Loader,
    SyntheticLoader,
    check_batch_size,
    eval_batch_size,
    train_transform,
)
from sret_jax.data.sources.classes import check_known
from sret_jax.data.sources.source import Source
from sret_jax.data.sources.splits import open_split
from sret_jax.data.views.images import EvalTransform
from sret_jax.data.views.mixing import Mixing
from sret_jax.distillation.soft_labels import SoftLabels
from sret_jax.distillation.stored_labels import check_same_data, stored_labels
from sret_jax.distillation.teacher import Teacher, open_teacher, with_classes
from sret_jax.errors import UserError
from sret_jax.models.flops import model_macs
from sret_jax.models.kernel_use import Use, kernel_uses
from sret_jax.models.model import Model
from sret_jax.models.registry import title
from sret_jax.parallel.mesh import (
    batch_sharding,
    make_mesh,
    process_count,
    replicated,
    state_shardings,
)
from sret_jax.settings.config_model import build_model, create_from_config
from sret_jax.training.backprop_loops import check_backprop_loops, lost_gradients
from sret_jax.training.batches import train_loader
from sret_jax.training.checks import check_numbers, check_room, check_writable
from sret_jax.training.hyperparameters import Hyperparameters, make_hyperparameters
from sret_jax.training.losses import LabelLoss
from sret_jax.training.mixed_depth import MixedDepth
from sret_jax.training.optimizer import make_optimizer
from sret_jax.training.state import TrainState, init_state
from sret_jax.training.step import Batch, abstract_batch, make_train_step
from sret_jax.training.train_loops import TrainLoops, make_train_loops
from sret_jax.weights.loading import class_names

CompiledStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Computation:
    """What a training run computes on given devices, independently of data and workdir.

    Attributes:
      config: the config of the run.
      model: the model; its number of classes is the config's, or else the data's.
      train_loops: the loops of each training step; evaluation has those of the model.
      mixing: the augmentation on the device.
      label_loss: the loss that is minimised.
      teacher: the teacher in distillation; None without config.teacher.
      soft_labels: a teacher's stored labels; None without config.data.soft_labels.
      mesh: mesh of all devices.
      steps_per_epoch: N / B, not rounded.
      total_steps: round(epochs * N / B).
      hyperparameters: the numbers that the step takes as arguments.
      optimizer: AdamW without the learning rate.
      abstract_state, shardings: shapes of the state, and its shardings over the mesh.
    """

    config: ConfigDict
    model: Model
    train_loops: TrainLoops
    mixing: Mixing
    label_loss: LabelLoss
    teacher: Teacher | None
    soft_labels: SoftLabels | None
    mesh: Mesh
    steps_per_epoch: float
    total_steps: int
    hyperparameters: Hyperparameters
    optimizer: optax.GradientTransformation
    abstract_state: TrainState
    shardings: TrainState

    @property
    def last_step(self) -> int:
        """The step at which this run ends: total_steps, or config.stop_at_step if it is earlier."""
        return min(self.total_steps, self.config.stop_at_step or self.total_steps)

    @property
    def loops_of_steps(self) -> np.ndarray:
        """The number of loops in each step of this run: (last_step,)."""
        return self.train_loops.of_steps(self.config.seed, self.total_steps)[: self.last_step]

    def gmacs(self, loops: int) -> float:
        """GMACs of one image's forward pass with that many loops."""
        return model_macs(self.model.clone(loops=loops)) / 1e9

    def mean_gmacs(self, start: int = 0) -> float:
        """GMACs of one image's forward pass, on average over this run's steps from `start` on."""
        counts, steps = np.unique(self.loops_of_steps[start:], return_counts=True)
        return float(np.average([self.gmacs(count) for count in counts.tolist()], weights=steps))

    def loops_figures(self) -> dict[str, Any]:
        """The loops of this run's steps and what they cost, in figures; {} if all have the same."""
        if self.train_loops.are_fixed:
            return {}
        loops = self.loops_of_steps
        return {
            "setting": self.train_loops.setting,
            "least": int(loops.min()),
            "most": int(loops.max()),
            "mean": float(loops.mean()),
            "evaluation": self.model.loops,
            "mean_gmacs_per_image": self.mean_gmacs(),
            "most_gmacs_per_image": self.gmacs(int(loops.max())),
        }

    @property
    def lost_gradients(self) -> str:
        """Says which parameters have no gradient because of config.recursion.backprop_loops."""
        k, most = self.config.recursion.backprop_loops, int(self.loops_of_steps.max())
        return lost_gradients(self.model, self.abstract_state.variables["params"], k, most)

    @property
    def model_title(self) -> str:
        """A name for the model in words; a published name only for the published model."""
        return title(self.model, self.config.model.name)

    @property
    def mixed_depth(self) -> MixedDepth:
        """The paths beside the full depth that have a loss."""
        return MixedDepth(**self.config.mixed_depth)

    @property
    def kernel_uses(self) -> list[Use]:
        """What computes each part of the model and of its teacher on these devices."""
        device = self.mesh.devices.flat[0]
        uses = kernel_uses(self.model, device)
        return uses + (
            kernel_uses(self.teacher.model, device, name="teacher") if self.teacher else []
        )

    def only_loops(self) -> int:
        """The loops of all training steps.

        Raises:
          UserError: steps differ.
        """
        if self.train_loops.are_fixed:
            return self.model.loops
        raise UserError(
            f"with config.recursion.train_loops={self.train_loops.setting} training steps differ, "
            "and this measures one of them; give --config.recursion.train_loops=fixed and the "
            "loops to measure, --config.model.loops=N"
        )

    def make_train_step(self, loops: int | None = None) -> jax.stages.Wrapped:
        """The jitted step: (state, batch, hyperparameters) and, if any, the teacher -> ...

        Args:
          loops: loops of the step; default: `only_loops`.
        """
        return make_train_step(
            self.model.clone(backprop_loops=self.config.recursion.backprop_loops),
            self.optimizer,
            self.mesh,
            self.shardings,
            mixing=self.mixing,
            grad_accum=self.config.grad_accum,
            label_loss=self.label_loss,
            teacher=self.teacher,
            loops=loops or self.only_loops(),
            mixed_depth=self.mixed_depth,
            head_only=self.config.optim.freeze_backbone,
        )

    def trace_train_step(self, loops: int | None = None) -> jax.stages.Traced:
        """Traces the step for the shapes of this run, to be counted, or lowered and compiled.

        Args:
          loops: loops of the step; default: `only_loops`.
        """
        labels = self.soft_labels.manifest.row_labels if self.soft_labels else {}
        batch = abstract_batch(self.config.batch_size, self.model.image_size, labels)
        teacher = (self.teacher.abstract_variables,) if self.teacher else ()
        arguments = (self.abstract_state, batch, self.hyperparameters, *teacher)
        return self.make_train_step(loops).trace(*arguments)

    def compile_train_step(self) -> CompiledStep:
        """The compiled step (state, batch) -> (state, metrics), if all steps have the same loops.

        Raises:
          UserError: steps differ.
        """
        loops = self.only_loops()
        return self.compile_train_steps()[loops]

    def compile_train_steps(self, start: int = 0) -> dict[int, CompiledStep]:
        """The compiled step of each number of loops that this run has from step `start` on.

        It holds all arguments but (state, batch). Where steps differ in their loops, the metrics
        have "loops" and "gmacs", those of one image's forward pass, too.
        """
        compiled = {
            loops: self.trace_train_step(loops).lower().compile()
            for loops in np.unique(self.loops_of_steps[start:]).tolist()
        }
        hyperparameters = jax.device_put(self.hyperparameters, replicated(self.mesh))
        teacher = (self.teacher.place(),) if self.teacher else ()

        def with_constants(loops: int) -> CompiledStep:
            drawn = not self.train_loops.are_fixed
            figures = {"loops": loops, "gmacs": self.gmacs(loops)} if drawn else {}

            def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
                state, metrics = compiled[loops](state, batch, hyperparameters, *teacher)
                return state, {**metrics, **figures}

            return step

        return {loops: with_constants(loops) for loops in compiled}

    def init_state(self) -> TrainState:
        """A fresh state, created directly on its devices."""
        init = jax.jit(
            lambda seed: init_state(self.model, self.optimizer, seed), out_shardings=self.shardings
        )
        return init(self.hyperparameters.seed)


@dataclasses.dataclass(frozen=True)
class Experiment(Computation):
    """A training run that is checked but not yet started.

    Attributes:
      workdir: folder that everything is written to.
      train_source, eval_source: the training and evaluation data.
    """

    workdir: epath.Path
    train_source: Source
    eval_source: Source

    @property
    def eval_every(self) -> int:
        """The number of steps between evaluations."""
        return self._steps(self.config.eval_every_epochs)

    @property
    def save_every(self) -> int:
        """The number of steps between checkpoints."""
        return self._steps(self.config.checkpoint.every_epochs)

    @property
    def keep_every(self) -> int:
        """Steps between checkpoints that are kept for good, a multiple of save_every; 0: none."""
        checkpoint = self.config.checkpoint
        if not checkpoint.keep_every_epochs:
            return 0
        return self.save_every * max(
            1, round(checkpoint.keep_every_epochs / checkpoint.every_epochs)
        )

    def train_batches(self, start_step: int) -> Loader | SyntheticLoader:
        """The training batches, starting with that of `start_step`; see `train_loader`."""
        return train_loader(
            self.train_source,
            self.config,
            self.model.image_size,
            self.config.batch_size,
            batch_sharding(self.mesh),
            start_step=start_step,
            soft_labels=self.soft_labels,
        )

    def _steps(self, epochs: float) -> int:
        return max(1, round(epochs * self.steps_per_epoch))


def open_experiment(config: ConfigDict, workdir: epath.Path) -> Experiment:
    """Checks a config and opens the data that it names.

    Raises:
      UserError: a sentence about the first error found.
    """
    check_numbers(config)
    check_writable(workdir)
    mesh = make_mesh(config.fsdp)
    check_settings(config, mesh)  # so errors appear before data are opened
    train_source = _open_training_split(config, workdir)
    classes = train_source.class_names
    eval_source = open_split(config, workdir, config.data.eval_split, classes)
    computation = build_computation(
        config,
        mesh,
        images=len(train_source),
        train_classes=len(train_source.classes_here),
        classes=len(classes),
    )
    if computation.teacher:
        teacher = with_classes(computation.teacher, config.teacher, classes)
        computation = dataclasses.replace(computation, teacher=teacher)
    if computation.soft_labels:
        check_same_data(computation.soft_labels, train_source, config)
    check_room(workdir, computation.abstract_state)
    return Experiment(
        **vars(computation), workdir=workdir, train_source=train_source, eval_source=eval_source
    )


def _open_training_split(config: ConfigDict, workdir: epath.Path) -> Source:
    """Opens the training split; labels are numbered as in the run that the workdir may contain."""
    source = open_split(config, workdir, config.data.train_split)
    kept = class_names(workdir) if has_checkpoints(workdir) else None
    if kept is None or kept == source.class_names:
        return source
    check_known(
        kept,
        source.classes_here,
        str(workdir),
        "give the data of that run, or another --workdir, to which config.init_from takes its "
        "weights",
    )
    return open_split(config, workdir, config.data.train_split, kept)


def small_data(experiment: Experiment) -> list[str]:
    """A sentence if the batch is larger than the data; otherwise nothing."""
    images, batch_size = len(experiment.train_source), experiment.config.batch_size
    if batch_size <= images:
        return []
    epochs = batch_size / images
    return [
        f"config.batch_size={batch_size} is more than the {images} training images: each step is "
        f"{epochs:.1f} epochs and shows an image several times. Give --config.batch_size={images} "
        "or less."
    ]


def check_settings(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError for errors that do not depend on the data: batches, model, augmentation."""
    mixing, processes = make_mixing(config), process_count(mesh)
    check_batch_size(
        "batch_size",
        config.batch_size,
        mesh.size,
        config.grad_accum,
        in_pairs=mixing.in_pairs,
        crops=config.data.crops_per_image,
        processes=processes,
    )
    check_batch_size(
        "eval_batch_size", eval_batch_size(config, mesh.size), mesh.size, processes=processes
    )
    label_loss = make_label_loss(config)
    if config.distill.required and not (config.teacher or config.data.soft_labels):
        raise UserError(
            "this config distils, and config.teacher is empty; give --config.teacher=PATH, the "
            "workdir of a run or a weight file, or stored labels, --config.data.soft_labels=DIR"
        )
    model = create_from_config(config, num_classes=1)
    if config.teacher or config.data.soft_labels:
        label_loss.check(model)
    train_loops = make_train_loops(config.recursion, model)
    mixed_depth = MixedDepth(**config.mixed_depth)
    fewest = train_loops.counts[0]
    try:
        mixed_depth.check(model.clone(loops=fewest))
    except UserError as e:
        if train_loops.are_fixed:
            raise
        steps = f"config.recursion.train_loops={train_loops.setting} has steps of {fewest} loops"
        raise UserError(f"{e} ({steps})") from e
    check_backprop_loops(config, train_loops, mixed_depth.weights(model))
    train_transform(config.augment, config.model.image_size)
    EvalTransform(config.model.image_size, config.data.test_crop)


def build_computation(
    config: ConfigDict, mesh: Mesh, *, images: int, train_classes: int, classes: int
) -> Computation:
    """Builds what a run of a checked config computes.

    Args:
      config: from configs/common.py.
      mesh: from `make_mesh`; its devices need not exist here.
      images: number of images in the training split.
      train_classes: number of classes with images in the training split, at least two.
      classes: number of classes of the training split; used if the config does not give a number.

    Raises:
      UserError: the config does not fit the data, or its teacher or stored labels cannot be read
        or do not fit.
    """
    soft_labels = stored_labels(config)
    model = build_model(config, classes)
    mixing = make_mixing(config)
    if train_classes < 2:
        raise UserError(
            f"{config.data.name} has {train_classes} class, but a classifier needs at least two; "
            "give data with more classes (in a folder data set, one folder per class)"
        )
    steps_per_epoch = images / config.batch_size
    steps = total_steps(config.epochs, steps_per_epoch)
    optimizer = make_optimizer(config.optim)
    abstract_state = jax.eval_shape(lambda: init_state(model, optimizer, config.seed))
    return Computation(
        config=config,
        model=model,
        train_loops=make_train_loops(config.recursion, model),
        mixing=mixing,
        label_loss=make_label_loss(config),
        teacher=open_teacher(config, mesh, model),
        soft_labels=soft_labels,
        mesh=mesh,
        steps_per_epoch=steps_per_epoch,
        total_steps=steps,
        hyperparameters=make_hyperparameters(config, steps_per_epoch, steps),
        optimizer=optimizer,
        abstract_state=abstract_state,
        shardings=state_shardings(abstract_state, mesh),
    )


def total_steps(epochs: float, steps_per_epoch: float) -> int:
    """The number of steps of a run, at least one."""
    return max(1, round(epochs * steps_per_epoch))


def make_mixing(config: ConfigDict) -> Mixing:
    """The augmentation on the device."""
    return Mixing(
        **{field.name: config.augment[field.name] for field in dataclasses.fields(Mixing)}
    )


def make_label_loss(config: ConfigDict) -> LabelLoss:
    """The loss of config.distill."""
    distill = config.distill
    return LabelLoss(distill.temperature, distill.hard_weight, distill.kind)
