"""The weights that a run starts from: fresh ones, or those of config.init_from, adapted to it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from sret_jax.data.sources.classes import are_labels, difference, order_of_classes
from sret_jax.data.sources.imagenet import assumed_ids, imagenet_ids
from sret_jax.errors import UserError
from sret_jax.models.adapters import adapters_of
from sret_jax.models.variables import Variables, block_names, is_head
from sret_jax.parallel.distributed import agreed
from sret_jax.training.experiment import Experiment
from sret_jax.training.state import TrainState
from sret_jax.weights.adaptation import fit, reorder_classes
from sret_jax.weights.loading import find
from sret_jax.weights.stored import Stored


def initial_state(experiment: Experiment, say: Callable[[str], None]) -> TrainState:
    """The state of step 0: fresh, or with the weights of config.init_from if it is given.

    What depends on the image size is resized, and `with_loops` adapts the loops. If the classes
    differ, the head is new; if only their order differs, the head is reordered. If the
    weights have no class names, or the data have numbers for ImageNet's classes, then equal
    numbers of classes are assumed to be the same classes. Adapters that the weights lack are new,
    which leaves the model's function unchanged. BatchNorm's statistics, if any, are kept. The
    moving average starts from the same weights.

    Args:
      experiment: the run.
      say: called with a sentence about what was loaded and what was changed in it.

    Raises:
      UserError: there are no readable weights, or they have another architecture.
    """
    config, model = experiment.config, experiment.model
    if not config.init_from:
        return experiment.init_state()
    with _naming_init_from(config.init_from):
        with agreed():
            stored = find(config.init_from, ema=config.init_ema)
            kept = stored.adapters(model)
            there, changed = stored.beside(model.clone(adapters=kept))
        read = stored.read(there, experiment.mesh)
    fresh = experiment.init_state()
    order, of_head = _order_of_classes(stored, there.num_classes, experiment)

    def fitted(weights: Variables, heads: Any, rows: Any) -> tuple[Variables, Variables]:
        params = fit(there, weights, model)["params"]
        params = params | {block: params[block] | own for block, own in rows.items()}
        weights = {**weights, "params": params}
        if order is None:
            weights = {**weights, "params": {**weights["params"], **heads}}
        else:
            weights = reorder_classes(weights, order)
        return weights, jax.tree.map(jnp.copy, weights)  # one buffer cannot be donated twice

    params, shardings = fresh.variables["params"], experiment.shardings
    heads = {name: part for name, part in params.items() if is_head(name)}
    new = [name for name in model.adapters if name not in kept]
    rows = {
        block: {own.name: params[block][own.name] for own in adapters_of(tuple(new))}
        for block in block_names(model)
    }
    variables, ema = jax.jit(fitted, out_shardings=(shardings.variables, shardings.ema))(
        read, heads, rows
    )
    changed += [f"new adapters {', '.join(new)}"] if new else []
    changed += [of_head] if of_head else []
    if stored.taken:
        say(stored.taken)
    if stored.config is None:
        say(
            f"{stored.place} does not say which settings its weights were trained with; where "
            "their shapes do not show them, those of config.model are assumed."
        )
    say(f"Starting from {stored.place}{', with ' if changed else ''}{'; '.join(changed)}.")
    return fresh.replace(variables=variables, ema=ema)


def _order_of_classes(
    stored: Stored, there: int, experiment: Experiment
) -> tuple[list[int] | None, str]:
    """The logit of the weights that each logit of the run starts from; None for a new head.

    The second result is a sentence about it, or "".
    """
    theirs = stored.class_names
    names, here = experiment.train_source.class_names, experiment.model.num_classes
    new_head = f"a new head for {here} classes, not the {there} there"
    if there != here:
        return None, new_head
    theirs = theirs or assumed_ids(there, names)
    if theirs is None or (theirs == imagenet_ids() and are_labels(names)):
        return [*range(here)], (
            "its head, whose class names are not compared: class 0 is taken for "
            f"{names[0]!r}, {len(names) - 1} for {names[-1]!r}"
        )
    order = order_of_classes(theirs, names, logits=here)
    if order is None:
        return None, f"{new_head}: {difference(theirs, names, 'in the data')}"
    if stored.class_names is None:
        return order, "its head, which has no class names and is taken for ImageNet's"
    return order, "" if theirs == names else "the head's classes in the order of the data"


@contextlib.contextmanager
def _naming_init_from(path: str) -> Iterator[None]:
    try:
        yield
    except UserError as e:
        raise type(e)(f"config.init_from={path}: {e}") from e
