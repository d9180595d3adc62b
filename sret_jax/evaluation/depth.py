"""What each application of a block does in a run: gradients, changes of the state, exits."""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from ml_collections import ConfigDict

from sret_jax.data.loader import eval_batch_size, eval_loader
from sret_jax.errors import UserError
from sret_jax.evaluation.checkpoint_evaluation import OpenedWeights, open_weights
from sret_jax.evaluation.exits import signals_of
from sret_jax.models.apply import normalise, training_logits
from sret_jax.models.dynamics import dynamics
from sret_jax.models.inspection import residual_coefficients
from sret_jax.models.model import Model
from sret_jax.models.read_out import mean_of_heads
from sret_jax.models.variables import block_names
from sret_jax.parallel.mesh import batch_sharding
from sret_jax.settings.saved_config import CONFIG_FILE, is_converted, load_config
from sret_jax.training.experiment import Experiment, open_experiment
from sret_jax.weights.loading import StoredFolder

STATE_BYTES = 2**28  # of the states that `dynamics` keeps at once
Figures = dict[str, Any]


def measure_depth(workdir: epath.Path, loops: Sequence[int] = ()) -> dict[str, Any]:
    """Measures gradient norms by depth on a training batch, and what each application does.

    Args:
      workdir: workdir of a run.
      loops: the numbers of loops to look at; (): the trained number, and twice as many.

    Returns:
      {"step", "blocks": number of unique blocks, "loops",
       "gradient_norm": {"start": [...], "end": [...]}: per application, from first to last, the
       norm of the mean loss's gradient at the application's output, for fresh weights and for the
       newest ones;
       "coefficients": {name: [...]}: per application, of the newest weights; None for the NLL's
       coefficients where an application has no NLL;
       "exits": {number of loops: {"top1", "entropy": per application of the last block, means over
       the evaluation split}}, and
       "dynamics": {number of loops: the figures of `dynamics` for some images of that split}, both
       for the averaged weights (or the raw ones)}.

    Raises:
      UserError: the workdir has no config of a run or no readable checkpoint, or its model cannot
        have that many loops.
    """
    config = load_config(workdir)
    if config is None or is_converted(config):
        raise UserError(f"{workdir} holds no {CONFIG_FILE} of a run; give the --workdir of one")
    experiment = open_experiment(config, workdir)
    model = experiment.model.clone(mesh=experiment.mesh)
    step, weights = StoredFolder(workdir).read_all(model, experiment.mesh)
    gradient_norm = jax.jit(_gradient_norms, static_argnums=0)
    batch = _first_batch(experiment)
    norms = {
        name: np.asarray(gradient_norm(model, variables, batch)).tolist()
        for name, variables in (
            ("start", experiment.init_state().variables),
            ("end", weights["eval"]),
        )
    }
    exits, changes = {}, {}
    for number in (loops or (model.loops, 2 * model.loops)) if model.has_exits else ():
        exits[str(number)], changes[str(number)] = _measure_loops(config, workdir, number)
    return {
        "step": step,
        "blocks": sum(model.blocks),
        "loops": model.loops,
        "gradient_norm": norms,
        "coefficients": residual_coefficients(model, weights["eval"]),
        "exits": exits,
        "dynamics": changes,
    }


def _measure_loops(config: ConfigDict, workdir: epath.Path, loops: int) -> tuple[Figures, Figures]:
    """What a run does with so many loops: the entries of `measure_depth`."""
    config = config.copy_and_resolve_references()
    config.model.loops = loops
    opened = open_weights(config, workdir)
    seen = signals_of(opened, config)
    exits = {
        "top1": seen.correct.mean(1).tolist(),
        "entropy": seen.found.entropy.mean(1).tolist(),
    }
    images = first_images(opened, config, _most_images(opened.model))
    variables = jax.device_get(opened.weights.get("eval_ema", opened.weights["eval"]))
    pixels = normalise(opened.model, jnp.asarray(images))
    return exits, dynamics(opened.model, variables, pixels)


def _most_images(model: Model) -> int:
    """How many images' states fit STATE_BYTES, at least one."""
    largest = max((stage.side**2 + stage.prefix) * stage.width for stage in model.stages)
    blocks = sum(model.blocks)
    return int(np.clip(STATE_BYTES // (4 * largest * model.loops * blocks), 1, 64))


def first_images(opened: OpenedWeights, config: ConfigDict, count: int) -> np.ndarray:
    """The first images of the evaluation split as the model sees them: (count, S, S, 3) uint8."""
    batch_size = eval_batch_size(config, opened.mesh.size)
    sharding = batch_sharding(opened.mesh)
    loader = eval_loader(opened.source, config, opened.model.image_size, batch_size, sharding)
    with contextlib.closing(loader):
        batch = jax.device_get(next(loader))
    return batch["image"][batch["real"] & ~batch["bad"]][:count]


def _first_batch(experiment: Experiment) -> dict[str, jax.Array]:
    with contextlib.closing(experiment.train_batches(start_step=0)) as loader:
        return next(loader)


def _gradient_norms(model: Model, variables: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """Gradient norms by depth; shape (applications,)."""
    names = block_names(model)

    def loss_fn(probes: jax.Array) -> jax.Array:
        collection = {name: {"gradient_norm": probes[i]} for i, name in enumerate(names)}
        probed = {**variables, "probes": collection}
        images = normalise(model, batch["image"])
        heads, _ = training_logits(model, probed, images, jax.random.key(0))
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(
            mean_of_heads(heads), batch["label"]
        )
        return losses.mean()

    return jax.grad(loss_fn)(jnp.zeros((len(names), model.loops))).ravel()
