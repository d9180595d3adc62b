"""The settings of a model: all of them, those that define it, and those that change its output."""

import dataclasses
from typing import Any

from sret_jax.models.model import Model

# Settings that change speed, rounding and gradients, but not what the model computes.
SPEED_ONLY = frozenset({"unroll", "remat", "backprop_loops", "attention", "mlp", "mesh", "dtype"})
# Settings that matter in training only.
TRAINING_ONLY = frozenset({"branch_init", "drop_path_rate"})


def fields(family: type[Model]) -> list[str]:
    """The names of a family's settings."""
    return [f.name for f in dataclasses.fields(family) if f.name not in ("parent", "name")]  # type: ignore[arg-type]


def model_settings(model: Model) -> dict[str, Any]:
    """The settings that define a model, by name: all except those in SPEED_ONLY."""
    return {name: getattr(model, name) for name in fields(type(model)) if name not in SPEED_ONLY}


def changed_settings(old: Model, new: Model) -> dict[str, tuple[Any, Any]]:
    """The settings in which two trained models compute differently: {name: (old, new)}.

    Models of two families differ in {"family": ...} alone.
    """
    if type(old) is not type(new):
        return {"family": (type(old).__name__, type(new).__name__)}
    before, after = function_settings(old), function_settings(new)
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def function_settings(model: Model) -> dict[str, Any]:
    """The settings that a trained model's output depends on, besides its weights."""
    settings = model_settings(model)
    return {name: value for name, value in settings.items() if name not in TRAINING_ONLY}
