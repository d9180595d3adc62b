"""Changes of the config when a run resumes: some are refused, others reported."""

from typing import Any

from sret_jax.data.sources.splits import other_slices
from sret_jax.errors import UserError
from sret_jax.models.model_settings import changed_settings as changed_model
from sret_jax.parallel.distributed import agreed, is_leader
from sret_jax.run.data_record import load_record
from sret_jax.settings.config_model import create_from_config
from sret_jax.settings.saved_config import changed_settings, load_config
from sret_jax.training.experiment import Experiment, total_steps
from sret_jax.training.hyperparameters import make_schedule

SCHEDULE = (
    "epochs",
    *("optim.lr_per_512", "optim.warmup_epochs", "optim.warmup_lr", "optim.min_lr"),
)
OTHER_ORDER = (
    "later images come in another order, so in the current epoch some images may be seen "
    "twice and others not at all"
)
OTHER_TEST = "accuracies before and after are not comparable; the best checkpoint is chosen by them"
NO_EFFECT = "no effect, because the run continues with its own weights"
# The consequence of a change, unless it is only that the new value holds from the next step on.
FOLLOWS = {
    "seed": OTHER_ORDER,
    "augment.repeats": OTHER_ORDER,
    "data.crops_per_image": OTHER_ORDER,
    "data.soft_labels": OTHER_ORDER,
    "data.eval_split": OTHER_TEST,
    "data.test_crop": OTHER_TEST,
    "ema_decay": "None: exp(-batch_size / ema_images)",
    "ema_images": "where there is no ema_decay",
    "init_from": NO_EFFECT,
    "init_ema": NO_EFFECT,
    "grad_accum": "BatchNorm normalises micro-batches of another size",
}


def compare_config(experiment: Experiment, step: int) -> list[str]:
    """Describes what changed since the workdir's config was saved, and the consequences.

    Args:
      experiment: the run.
      step: the last step that it took.

    Returns:
      Sentences in process 0, none if nothing changed; none in other processes.

    Raises:
      UserError: the change would give another meaning to the steps taken so far.
    """
    with agreed():
        if not is_leader():
            return []
        changed = changed_settings(experiment.config, experiment.workdir)
        _refuse(changed, experiment, step)
    images = len(experiment.train_source)
    if then := load_record(experiment.workdir):
        images = then["train"]["images"]
    sentences = []
    if changed:
        sentences.append(f"These settings change from step {step + 1:,} on:")
    for name, (old, new) in changed.items():
        follows = _follows(name, experiment)
        sentences.append(f"  {name}: {old} -> {new}{f' ({follows})' if follows else ''}")
    if images != len(experiment.train_source) or any(name in SCHEDULE for name in changed):
        sentences.append(_other_schedule(experiment, step, images))
    return sentences


def _follows(name: str, experiment: Experiment) -> str:
    """The consequence of a changed setting, or ""."""
    if name == "grad_accum" and "batch_stats" not in experiment.abstract_state.variables:
        return ""
    if name == "epochs" and len(experiment.train_loops.phases) > 1:
        return "config.recursion.train_loops changes the loops at fractions of all steps"
    return FOLLOWS.get(name, "")


def _refuse(changed: dict[str, tuple[Any, Any]], experiment: Experiment, step: int) -> None:
    workdir = experiment.workdir
    if "data.synthetic" in changed:
        raise UserError(
            f"{workdir} was not trained with "
            f"config.data.synthetic={experiment.config.data.synthetic}; give another --workdir"
        )
    if model := _changed_function(experiment):
        raise UserError(
            f"{workdir} was trained with another model ({'; '.join(model)}); use its own config or "
            "another --workdir"
        )
    if slices := other_slices(experiment.config, changed):
        old, _ = changed["data.folder_slices"]
        raise UserError(
            f"{workdir} was trained on {slices}, so that its training images would become test "
            f"images; continue with --config.data.folder_slices={old}, or give another --workdir"
        )
    if "batch_size" in changed:
        old, new = changed["batch_size"]
        raise UserError(
            f"{workdir} was trained with batches of {old} to step {step:,}, and its steps, its "
            f"schedule and the order of its images are counted in such batches, not in those of "
            f"config.batch_size={new}; keep {old}, where memory is short with "
            "--config.grad_accum=N for micro-batches, or start in another --workdir from "
            f"--config.init_from={workdir}"
        )
    if "epochs" in changed and experiment.total_steps < step:
        raise UserError(
            f"config.epochs={experiment.config.epochs} ends at step {experiment.total_steps:,}, "
            f"and {workdir} is at step {step:,} already; give more epochs, or evaluate it with "
            "--mode=eval"
        )


def _changed_function(experiment: Experiment) -> list[str]:
    """The changes that affect what the saved model computes, even if its arrays stay the same."""
    saved = load_config(experiment.workdir)
    if saved is None:
        return []
    model = experiment.model
    changed = changed_model(create_from_config(saved, model.num_classes), model)
    return [f"model.{name}: {old} -> {new}" for name, (old, new) in changed.items()]


def _other_schedule(experiment: Experiment, step: int, images: int) -> str:
    """Says where the schedule now ends and the learning rate; there were `images` images before."""
    old = load_config(experiment.workdir)
    assert old is not None
    steps_per_epoch = images / old.batch_size
    old_total = total_steps(old.epochs, steps_per_epoch)
    old_schedule = make_schedule(old.optim, old.batch_size, steps_per_epoch, old_total)
    rate = experiment.hyperparameters.schedule(step)
    return (
        f"The schedule ends at step {experiment.total_steps:,}, where it was {old_total:,}; the "
        f"learning rate of step {step + 1:,} is {float(rate):.2e}, where it was "
        f"{float(old_schedule(step)):.2e}."
    )
