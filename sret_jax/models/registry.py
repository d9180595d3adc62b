"""Finds models by name: those of this package, and those of a user's own module."""

import difflib
import fnmatch
import functools
import importlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sret_jax.errors import did_you_mean
from sret_jax.models.checks import check
from sret_jax.models.families.deit import DeiT
from sret_jax.models.families.mixer import Mixer
from sret_jax.models.families.pit import PiT
from sret_jax.models.families.sret import SReT
from sret_jax.models.families.swin import Swin
from sret_jax.models.model import Model, Variant
from sret_jax.models.model_settings import SPEED_ONLY, fields, function_settings, model_settings
from sret_jax.models.variables import abstract_variables

FAMILIES: tuple[type[Model], ...] = (SReT, DeiT, PiT, Swin, Mixer)


def list_models(pattern: str = "*") -> list[str]:
    """The names of the published models that `create_model` knows.

    Args:
      pattern: of the names, with wildcards: "sret_*".
    """
    names = (name for family in FAMILIES for name in family.variants)
    return sorted(fnmatch.filter(names, pattern))


def renamed(arrays: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arrays of a file under the names in `Model.torch_entries`; see `Model.renamed`."""
    for family in FAMILIES:
        arrays = family.renamed(arrays)
    return arrays


def family_of(name: str) -> type[Model]:
    """The family of a model.

    Args:
      name: one of `list_models()`, or "module:name" for a model that the `variants` of a `Model`
        in an importable module contain.

    Raises:
      ValueError: there is no such model.
    """
    module, own, inside = name.rpartition(":")
    families = _families_in(module) if own else FAMILIES
    for family in families:
        if inside in family.variants:
            return family
    known = [variant for family in families for variant in family.variants]
    if not known:
        raise ValueError(
            f"the module {module} has no model {inside!r}, because none of its classes is a "
            "subclass of sret_jax.models.model.Model with `variants`"
        )
    raise ValueError(did_you_mean(f"model of {module}" if own else "model", inside, known))


def variant(name: str, image_size: int | None = None) -> Variant:
    """The published member of a family, by name.

    Args:
      name: one of `list_models()`, or "module:name" for a model of your own.
      image_size: returns what is published at this image size, if anything is.

    Raises:
      ValueError: there is no such model.
    """
    return family_of(name).variants[name.rpartition(":")[2]].at(image_size)


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    image_size: int = 224,
    dtype: DTypeLike = jnp.float32,
    **overrides: Any,
) -> Model:
    """Builds a published model, or a modified one.

    Args:
      name: one of `list_models()`, or "module:name" for a model of your own.
      num_classes: width of the logits.
      image_size: side of the square input in pixels; what is published at this size is taken.
      dtype: dtype of activations and matrix products; see `Model`.
      **overrides: settings of the model's family that replace the published ones: the attributes
        of `Model`, of `SlicedModel` where blocks attend over all tokens, and of the family.

    Returns:
      A Flax module. `model.apply(variables, images_nhwc, train=False)` returns logits
      (B, num_classes).

    Raises:
      ValueError: the name or an override is unknown, or the sizes do not fit each other.
    """
    family = family_of(name)
    known = fields(family)
    for key in overrides:
        if key not in known:
            raise ValueError(_no_setting(name, family, key))
    settings = {**variant(name, image_size).settings, **overrides}
    model = family.of(num_classes=num_classes, image_size=image_size, dtype=dtype, **settings)
    check(model)
    return model


def title(model: Model, start: str | None = None) -> str:
    """A name for the model: "sret_t", or "a model of 0.31M parameters after sret_t".

    A model has a published name if it differs from the published one at most in image size (and
    what else is `resizable`), classes, drop path and speed. `start` is the variant that any other
    model was derived from; None: unknown.
    """
    for name in type(model).variants:
        if all(getattr(model, field) == value for field, value in _published(model, name).items()):
            return name
    count = sum(p.size for p in jax.tree.leaves(abstract_variables(model)["params"]))
    size = f"{count / 1e6:.2f}M" if count >= 10_000 else f"{count:,}"
    return f"a model of {size} parameters" + (f" after {start}" if start else "")


def nearest_variant(model: Model) -> str:
    """The variant of the model's family that has the most settings in common with it."""

    def shared(name: str) -> int:
        published = _published(model, name)
        return sum(getattr(model, field) == value for field, value in published.items())

    return max(sorted(type(model).variants), key=shared)


def of_timm(architecture: str) -> tuple[str, Mapping[str, Any], str]:
    """What an architecture of timm is here: a variant, settings that differ, timm's global_pool.

    Raises:
      ValueError: no family has it.
    """
    for family in FAMILIES:
        if architecture in (names := family.timm_names()):
            return *names[architecture], family.pool_in_timm
    known = [name for family in FAMILIES for name in family.timm_names()]
    nearest = difflib.get_close_matches(architecture, known, 1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    families = ", ".join(family.__name__ for family in FAMILIES)
    raise ValueError(f"{architecture!r} is no architecture of the families here, {families}{hint}")


def to_timm(model: Model, start: str) -> tuple[str, str]:
    """The model's name in timm, or else `start`, and timm's global_pool.

    Args:
      model: the model.
      start: the variant that it was derived from.
    """
    of_data = {n: getattr(model, n) for n in ("num_classes", "image_size", "mean", "std")}
    for architecture, (name, settings) in type(model).timm_names().items():
        theirs = type(model).of(**{**of_data, **variant(name).settings, **settings})
        if function_settings(theirs) == function_settings(model):
            return architecture, model.pool_in_timm
    return start, model.pool_in_timm


def _published(model: Model, name: str) -> Mapping[str, Any]:
    """The settings of a published model that make it what it is."""
    same = dict(num_classes=model.num_classes, image_size=model.image_size)
    published = type(model).of(
        **{**same, **type(model).variants[name].at(model.image_size).settings}
    )
    free = SPEED_ONLY | same.keys() | type(model).resizable | {"drop_path_rate"}
    return {k: v for k, v in model_settings(published).items() if k not in free}


def _no_setting(name: str, family: type[Model], key: str) -> str:
    if key in ("groups", "permutation"):
        return f"{name} cannot be sliced into groups: {family.why_unsliced}; leave {key} out"
    nearest = difflib.get_close_matches(key, fields(family), 1, cutoff=0.0)[0]
    has = ", ".join(fields(family))
    return f"{name} has no setting {key!r}; did you mean {nearest!r}? (it has {has})"


@functools.cache
def _families_in(module: str) -> tuple[type[Model], ...]:
    """The families that an importable module defines."""
    try:
        found = importlib.import_module(module)
    except Exception as e:
        if isinstance(e, ModuleNotFoundError) and e.name and f"{module}.".startswith(f"{e.name}."):
            raise ValueError(
                f"there is no module {e.name!r} on Python's path, which {module}:... names; start "
                "the command in its folder, or add its folder to PYTHONPATH"
            ) from e
        text = " ".join(str(e).split())
        raise ValueError(
            f"the module {module}, which {module}:... names, cannot be imported: "
            f"{type(e).__name__}: {text}"
        ) from e
    return tuple(
        value
        for value in vars(found).values()
        if isinstance(value, type) and issubclass(value, Model) and value.__module__ == module
    )
