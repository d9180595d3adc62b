"""Trained models: of a run, of one of its steps, of converted or published weights."""

import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sret_jax.checkpoints.manager import CHECKPOINTS
from sret_jax.checkpoints.reading import best_step, read_weights, saved_shapes
from sret_jax.errors import UserError, few
from sret_jax.files import absolute
from sret_jax.models.families.sret import (
    SPEED_ONLY,
    STEM_STRIDE,
    SReT,
    abstract_variables,
    create_model,
    model_settings,
)
from sret_jax.models.families.variants import list_models, nearest_variant
from sret_jax.models.loops import with_loops
from sret_jax.models.position import with_image_size
from sret_jax.parallel.distributed import say
from sret_jax.parallel.mesh import with_shardings
from sret_jax.settings.config_model import create_from_config
from sret_jax.settings.saved_config import CLASSES_FILE, CONFIG_FILE, load_config
from sret_jax.weights.description import Description
from sret_jax.weights.torch_names import StateDictError, from_torch
from sret_jax.weights.weight_files import WeightFile, read_weight_file

PUBLISHED_TEST_CROP = 0.875
BEST = "best"  # in place of a step: RUN/checkpoints/best
OTHERWISE = (
    "others are given with --unsliced, with groups= from Python, or of a teacher with "
    "config.distill.teacher_groups"
)

Shapes = Mapping[str, tuple[int, ...]]


def load(
    path: epath.PathLike, *, ema: bool = False, name: str | None = None, **settings: Any
) -> tuple[SReT, dict[str, Any]]:
    """A trained model and its weights, on the first device.

    Args:
      path: the workdir of a run, one of its steps (RUN/checkpoints/120, or RUN/checkpoints/best
        for that of the highest raw top-1), a converted checkpoint, or a file of weights under the
        published names, told by its content (torch's or safetensors).
      ema: takes a run's averaged weights, or those that a training script keeps in a file.
      name: of the published variant; default: as the run or file says, or the one that the arrays
        fit.
      **settings: of the model, where they are not to be its own, e.g. loops=3 (see `with_loops`),
        image_size=384 (see `with_image_size`), permutation="random". Files of others do not say
        how attention was sliced: the variant's own groups are assumed, and it is printed;
        groups=None means none.

    Returns:
      (model, variables), for `model.apply(variables, images, train=False)` or `predict`.

    Raises:
      UserError: nothing readable there, weights of no known model, or settings that do not fit.
    """
    model, variables = load_on_host(path, ema=ema, name=name, **settings)
    return model, jax.device_put(variables, jax.local_devices()[0])


def load_on_host(
    path: epath.PathLike, *, ema: bool = False, name: str | None = None, **settings: Any
) -> tuple[SReT, dict[str, Any]]:
    """As `load`, with NumPy arrays, to be laid on any devices."""
    place = absolute(path)
    loops, image_size = (settings.pop(key, None) for key in ("loops", "image_size"))
    if place.is_file():
        model, variables = _load_file(place, name, ema, settings)
    else:
        model, variables = _load_folder(place, name, ema, settings)
    try:
        if image_size not in (None, model.image_size):
            model, variables = with_image_size(model, variables, image_size)
        if loops not in (None, model.loops):
            model, variables = with_loops(model, variables, loops)
    except ValueError as e:
        raise UserError(f"{place}: {e}") from e
    return model, jax.tree.map(np.asarray, variables)


def class_names(path: epath.PathLike) -> list[str] | None:
    """The classes that weights were trained on, in the order of the logits; None if not kept."""
    place = absolute(path)
    if place.is_file():
        described = describe(place)
        return described.class_names if described else None
    workdir, _ = split_step(place)
    file = workdir / CLASSES_FILE
    if not file.exists():
        return None
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{file} is damaged ({e}); fix it or move it away") from e
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file} holds no list of names; fix it or move it away")
    return names


def test_crop(path: epath.PathLike) -> float:
    """The share of the shorter side that weights saw in evaluation, config.data.test_crop.

    Where it is not kept it is 0.875, as published.

    Raises:
      UserError: a damaged config.json or file.
    """
    config, source = _config_of(absolute(path))
    if config is None:
        return PUBLISHED_TEST_CROP
    try:
        return float(config.data.test_crop)
    except (AttributeError, TypeError, ValueError) as e:
        raise UserError(f"{source} has no data.test_crop ({e}); fix it, or move it away") from e


def variant_of(path: epath.PathLike, model: SReT) -> str:
    """The published variant that the model at this path is, or was made from."""
    config, _ = _config_of(absolute(path))
    return config.model.name if config else nearest_variant(model_settings(model))


def _config_of(place: epath.Path) -> tuple[ConfigDict | None, epath.Path]:
    """The config kept with weights, if there is one, and where it is kept."""
    if place.is_file():
        described = describe(place)
        return described.config if described else None, place
    workdir, _ = split_step(place)
    return load_config(workdir), workdir / CONFIG_FILE


def describe(file: epath.Path) -> Description | None:
    """What a weight file says of its weights; None of a file that was not written here.

    Raises:
      UserError: an unreadable file.
    """
    content = read_weight_file(file).description
    return None if content is None else Description.from_json(content, file)


def split_step(path: epath.Path) -> tuple[epath.Path, int | None]:
    """The workdir and the step that a path names; None: the newest step.

    RUN/checkpoints/120 -> (RUN, 120); RUN/checkpoints/best -> RUN and the step of the highest raw
    top-1; another path is a workdir.

    Raises:
      UserError: the best step is asked for, and none was evaluated.
    """
    if path.parent.name == CHECKPOINTS and path.name.isdecimal():
        return path.parent.parent, int(path.name)
    if path.parent.name == CHECKPOINTS and path.name == BEST:
        return path.parent.parent, best_step(path.parent.parent)
    return path, None


def model_of_folder(
    folder: epath.Path, name: str | None = None, step: int | None = None, **settings: Any
) -> SReT:
    """The model that the weights of a workdir or converted checkpoint are of.

    Args:
      folder: holds checkpoints/.
      name: of the variant; default: as the folder's config.json says, or the published variant
        that the arrays fit.
      step: of the weights; default: the newest.
      **settings: of the model, instead of its own.

    Raises:
      UserError: no readable weights, weights of no known model, or settings that do not fit.
    """
    shapes = saved_shapes(folder, step)
    try:
        (num_classes,) = shapes["params/head/bias"]
        _, side, _, _ = shapes["params/pos_embed"]
    except (KeyError, ValueError) as e:
        raise UserError(f"{folder} holds no weights of a SReT; give the folder of a run") from e
    sizes = {"num_classes": num_classes, "image_size": side * STEM_STRIDE, **settings}
    config = load_config(folder)
    if config is not None and name in (None, _name_in(config)):
        return _model_of_config(config, num_classes, settings, folder / CONFIG_FILE)
    return create(name, sizes) if name else _variant_with(shapes, sizes, folder)


def described_model(file: WeightFile, place: epath.Path, **settings: Any) -> SReT | None:
    """The model that a file says its weights are of; None of a file that was not written here.

    Args:
      file: what is in it.
      place: where it is.
      **settings: of the model, instead of its own.

    Raises:
      UserError: it describes no model, or settings that do not fit.
    """
    if file.description is None:
        return None
    config = Description.from_json(file.description, place).config
    return _model_of_config(config, config.model.get("num_classes"), settings, place)


def _model_of_config(
    config: ConfigDict, num_classes: int, settings: Mapping[str, Any], source: epath.Path
) -> SReT:
    """The model that a run or a file says it is, with other settings where they are given."""
    try:
        model = create_from_config(config, num_classes)
    except (AttributeError, KeyError, TypeError) as e:
        raise UserError(f"{source} describes no model ({e}); fix it, or move it away") from e
    speed = {name: getattr(model, name) for name in SPEED_ONLY}
    return create(config.model.name, {**speed, **model_settings(model), **settings})


def model_of_state_dict(state_dict: Mapping[str, Any], name: str, **settings: Any) -> SReT:
    """The variant with the classes and image size that published arrays show."""
    head, position = (
        getattr(state_dict.get(array), "shape", ()) for array in ("head.weight", "pos_embed")
    )
    sizes = {}
    if head:
        sizes["num_classes"] = head[0]
    if position:
        sizes["image_size"] = position[-1] * STEM_STRIDE
    return create(name, {**sizes, **settings})


def create(name: str, settings: Mapping[str, Any]) -> SReT:
    """`create_model`, whose complaint is a UserError."""
    try:
        return create_model(name, **settings)
    except ValueError as e:
        raise UserError(str(e)) from e


def _load_folder(
    place: epath.Path, name: str | None, ema: bool, settings: dict[str, Any]
) -> tuple[SReT, dict[str, Any]]:
    workdir, step = split_step(place)
    if not workdir.exists():
        raise UserError(
            f"there is no {workdir}; give a run, one of its steps, a converted checkpoint or a "
            "weight file"
        )
    model = model_of_folder(workdir, name, step, **settings)
    config = load_config(workdir)
    if config is None:
        say(_assumption(workdir, name, settings, model))
    elif name not in (None, _name_in(config)):
        say(_override(workdir, _name_in(config), name, model))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = abstract_variables(model)
    targets = with_shardings(shapes, jax.tree.map(lambda _: here, shapes))
    _, weights = read_weights(workdir, targets, step)
    which = "eval_ema" if ema else "eval"
    if which not in weights:
        raise UserError(f"{place} holds no averaged weights; leave out ema")
    return model, jax.device_get(weights[which])


def _load_file(
    place: epath.Path, name: str | None, ema: bool, settings: dict[str, Any]
) -> tuple[SReT, dict[str, Any]]:
    file = read_weight_file(place, ema=ema)
    model = described_model(file, place, **settings)
    own = _name_in(Description.from_json(file.description, place).config) if model else None
    if model is not None and name in (None, own):
        try:
            return model, from_torch(file.state_dict, model)
        except StateDictError as e:
            raise UserError(f"{place} is not what it says it is: {few(e.problems)}") from e
    model, variables = _published(place, file.state_dict, name, settings)
    say(file.taken)
    if own and name:
        say(_override(place, own, name, model))
    else:
        say(_assumption(place, name, settings, model))
    return model, variables


def _published(
    place: epath.Path, state_dict: Mapping[str, Any], name: str | None, settings: dict[str, Any]
) -> tuple[SReT, dict[str, Any]]:
    """The published variant of that name, or the one that the arrays fit, and its variables."""
    misfits: dict[str, list[str]] = {}
    for variant in [name] if name else list_models():
        try:
            model = model_of_state_dict(state_dict, variant, **settings)
            return model, from_torch(state_dict, model)
        except StateDictError as e:
            misfits[variant] = e.problems
        except UserError as e:
            otherwise = "" if "groups" in settings else f" ({OTHERWISE})"
            raise UserError(f"{place}: {e}{otherwise}") from e
    nearest = min(misfits, key=lambda variant: len(misfits[variant]))
    raise UserError(
        f"{place} does not fit {' or '.join(misfits)}, of which {nearest} is the nearest: "
        f"{few(misfits[nearest])}"
        if len(misfits) > 1
        else f"{place} does not fit {nearest}: {few(misfits[nearest])}"
    )


def _variant_with(shapes: Shapes, settings: Mapping[str, Any], folder: epath.Path) -> SReT:
    """The published variant whose arrays have these shapes."""
    for name in list_models():
        model = create(name, settings)
        if model_shapes(model) == shapes:
            return model
    raise UserError(
        f"{folder} has no config.json, and its arrays fit none of {', '.join(list_models())}; put "
        "the config.json of its run there"
    )


def _assumption(
    place: epath.Path, name: str | None, settings: Mapping[str, Any], model: SReT
) -> str:
    """What is taken for granted of weights that do not say what they are."""
    if name and "groups" in settings:
        return ""
    variant = name or nearest_variant(model_settings(model))
    assumed = f"{place} does not say which model it holds; it is taken for {variant}"
    if "groups" in settings:
        return f"{assumed}, whose arrays it has."
    return f"{assumed} with attention groups {model.groups}, as published ({OTHERWISE})."


def _name_in(config: ConfigDict) -> str | None:
    """The variant that a config names, if it describes a model."""
    return config.get("model", {}).get("name")


def _override(place: epath.Path, own: str | None, name: str, model: SReT) -> str:
    """What is taken for granted of weights that say they are another variant."""
    return (
        f"{place} says that it holds a {own}, and is taken for the {name} that was asked for, with "
        f"attention groups {model.groups}."
    )


def model_shapes(model: SReT) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's weights, by path such as "params/head/bias"."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_variables(model))
    keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {keystr(path): leaf.shape for path, leaf in leaves}
