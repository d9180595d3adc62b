"""What a run starts from: fresh weights, or those of config.init_from fitted to its model."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import NamedSharding

from sret_jax.checkpoints.manager import differences
from sret_jax.checkpoints.reading import read_weights, saved_shapes
from sret_jax.data.sources.classes import are_labels, difference, order_of_classes
from sret_jax.data.sources.imagenet import assumed_ids, imagenet_ids
from sret_jax.errors import UserError
from sret_jax.files import absolute
from sret_jax.models.apply import Variables
from sret_jax.models.families.sret import SReT, abstract_variables
from sret_jax.parallel.distributed import agreed
from sret_jax.parallel.mesh import replicated, with_shardings
from sret_jax.settings.saved_config import CONFIG_FILE
from sret_jax.training.experiment import Experiment
from sret_jax.training.state import TrainState
from sret_jax.weights.adaptation import (
    adapt,
    as_saved,
    changes,
    compare,
    other_architecture,
    reorder_classes,
)
from sret_jax.weights.pretrained import (
    Shapes,
    class_names,
    described_model,
    model_of_folder,
    model_shapes,
    split_step,
)
from sret_jax.weights.torch_names import StateDictError, from_torch
from sret_jax.weights.weight_files import read_weight_file


@dataclasses.dataclass(frozen=True)
class Saved:
    """Trained weights as they lie on disk.

    Attributes:
      model: of the run's architecture, with the classes, image size and loops of the weights.
      variables: whole on every device, or NumPy arrays.
      class_names: where they are kept.
      otherwise: what the run's model computes otherwise than theirs, in words.
      notes: sentences on what was read, and what was taken for granted.
    """

    model: SReT
    variables: Variables
    class_names: list[str] | None
    otherwise: list[str]
    notes: list[str]


def initial_state(experiment: Experiment, say: Callable[[str], None]) -> TrainState:
    """The state of step 0: that of a fresh run, its weights those of config.init_from if given.

    The position array is resized to the run's image size and loops are fitted by `with_loops`; the
    head is made anew where the classes are others, and put in the data's order where it is another.
    Where no names are kept, or where ImageNet's classes are numbers in the data, as many classes
    are taken for the same.
    BatchNorm's statistics are kept. The moving average starts from the same weights.

    Args:
      experiment: the run.
      say: takes a sentence on what was loaded and what of it was changed.

    Raises:
      UserError: no readable weights there, or weights of another architecture.
    """
    config, model = experiment.config, experiment.model
    if not config.init_from:
        return experiment.init_state()
    with _naming_init_from(config.init_from):
        place = absolute(config.init_from)
        if place.is_file():
            saved = _read_file(place, model, ema=config.init_ema)
        else:
            target = replicated(experiment.mesh)
            saved = _read_folder(place, model, target, ema=config.init_ema)
    fresh = experiment.init_state()
    order, of_head = _order_of_classes(saved, experiment)

    def fit(weights: Variables, head: Any) -> tuple[Variables, Variables]:
        weights = adapt(saved.model, weights, model)
        if order is None:
            weights["params"] = {**weights["params"], "head": head}
        else:
            weights = reorder_classes(weights, order)
        return weights, jax.tree.map(jnp.copy, weights)  # donation may not meet one buffer twice

    shardings = experiment.shardings
    variables, ema = jax.jit(fit, out_shardings=(shardings.variables, shardings.ema))(
        saved.variables, fresh.variables["params"]["head"]
    )
    changed = changes(saved.model, model) + saved.otherwise
    changed += [of_head] if of_head else []
    for note in saved.notes:
        say(note)
    say(f"Starting from {place}" + (f", with {'; '.join(changed)}" if changed else "") + ".")
    return fresh.replace(variables=variables, ema=ema)


def _order_of_classes(saved: Saved, experiment: Experiment) -> tuple[list[int] | None, str]:
    """Which logit there each logit of the run starts from; None for a new head.

    Also what to say of it, if anything.
    """
    theirs, there = saved.class_names, saved.model.num_classes
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
    if saved.class_names is None:
        return order, "its head, which keeps no class names and is taken for ImageNet's"
    return order, "" if theirs == names else "the head's classes in the order of the data"


@contextlib.contextmanager
def _naming_init_from(path: str) -> Iterator[None]:
    try:
        yield
    except UserError as e:
        raise type(e)(f"config.init_from={path}: {e}") from e


def _read_folder(place: epath.Path, like: SReT, target: NamedSharding, *, ema: bool) -> Saved:
    """The weights of a workdir, of one of its steps, or of a converted checkpoint."""
    workdir, step = split_step(place)
    with agreed():
        if not workdir.exists():
            raise UserError(f"there is no {workdir}; correct the path")
        shapes = saved_shapes(workdir, step)
        model = as_saved(like, shapes)
        _check_shapes(shapes, model)
        described = (workdir / CONFIG_FILE).exists()
        otherwise = compare(model_of_folder(workdir, step=step), like) if described else []
        names = class_names(place)
    abstract = abstract_variables(model)
    targets = with_shardings(abstract, jax.tree.map(lambda _: target, abstract))
    _, weights = read_weights(workdir, targets, step)
    which = "eval_ema" if ema else "eval"
    with agreed():
        if which not in weights:
            raise UserError("there are no averaged weights; set config.init_ema=False")
    return Saved(
        model, weights[which], names, otherwise, [] if described else [_assumption(workdir)]
    )


def _read_file(place: epath.Path, like: SReT, *, ema: bool) -> Saved:
    """The weights under the published names in a file."""
    with agreed():
        file = read_weight_file(place, ema=ema)
        model = as_saved(like, _shown_by(file.state_dict, like))
        try:
            variables = from_torch(file.state_dict, model)
        except StateDictError as e:
            raise other_architecture(e.problems) from e
        except ValueError as e:
            raise UserError(str(e)) from e
        there = described_model(file, place)
        otherwise = compare(there, like) if there else []
        notes = [file.taken] if file.taken else []
        notes += [] if there else [_assumption(place)]
        return Saved(model, variables, class_names(place), otherwise, notes)


def _assumption(place: epath.Path) -> str:
    return (
        f"{place} does not say which heads, groups and permutation its weights were trained with; "
        "those of config.model are assumed."
    )


def _shown_by(state_dict: Mapping[str, Any], like: SReT) -> Shapes:
    """What published names and shapes tell of a model's sizes, as `as_saved` takes it."""
    shapes = {
        path: tuple(getattr(state_dict.get(name), "shape", ()))
        for path, name in (("params/head/bias", "head.bias"), ("params/pos_embed", "pos_embed"))
    }
    if len(position := shapes["params/pos_embed"]) == 4:
        batch, channels, height, width = position
        shapes["params/pos_embed"] = (batch, height, width, channels)
    first_stage = re.compile(r"transformers\.0\.blocks\.(\d+)\.")  # F, NLL, F, NLL, ...
    layers = {match[1] for name in state_dict if (match := first_stage.match(name))}
    nlls, left = divmod(len(layers), 2 * like.blocks[0])
    if nlls and not left:
        shapes["params/stage0_block0/nll/residual/skip"] = (nlls,)
    return shapes


def _check_shapes(shapes: Shapes, model: SReT) -> None:
    if problems := differences(dict(shapes), model_shapes(model)):
        raise other_architecture(problems)
