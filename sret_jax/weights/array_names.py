"""The names of arrays in files: the published ones, in torch, or else those of Flax.

A model whose settings have no published names is stored under paths such as "params/head/bias",
with the shapes that its arrays have in Flax.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sret_jax.checkpoints.manager import array_shapes, differences
from sret_jax.models.model import Model
from sret_jax.models.variables import Variables, abstract_variables
from sret_jax.weights.torch_names import StateDictError, from_torch, to_torch

SEPARATOR = "/"  # in no name of torch


def why_in_flax(model: Model) -> str:
    """Why the model has no published names; "" if it has them."""
    try:
        next(iter(model.torch_entries()))
    except ValueError as e:
        return str(e)
    return ""


def to_arrays(variables: Variables, model: Model) -> dict[str, np.ndarray]:
    """The arrays by name; the inverse of `from_arrays`."""
    if not why_in_flax(model):
        return to_torch(variables, model)
    return {name: np.asarray(x) for name, x in flatten_dict(variables, sep=SEPARATOR).items()}


def from_arrays(arrays: Mapping[str, Any], model: Model) -> Variables:
    """The variables of arrays by name; the inverse of `to_arrays`.

    Raises:
      ValueError: see `from_torch`, which also says when it is a `StateDictError`.
    """
    if not in_flax(arrays):
        return from_torch(arrays, model)
    shapes = {name: tuple(getattr(array, "shape", ())) for name, array in arrays.items()}
    if problems := differences(shapes, array_shapes(abstract_variables(model))):
        raise StateDictError(problems)
    return unflatten_dict({n: np.asarray(x, np.float32) for n, x in arrays.items()}, sep=SEPARATOR)


def names_of(model: Model, *, like: Iterable[str]) -> set[str]:
    """The names of a model's arrays in a file whose names are of the kind of `like`."""
    entries = model.torch_entries()
    if in_flax(like):
        return {SEPARATOR.join(entry.path) for entry in entries}
    return {entry.torch_name for entry in entries}


def in_flax(names: Iterable[str]) -> bool:
    """Whether the names of a file's arrays are those of Flax."""
    return any(name.startswith(f"params{SEPARATOR}") for name in names)
