"""Converts between Flax variables and the published PyTorch state dicts, in both directions."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from sret_jax.models.model import Model
from sret_jax.models.variables import abstract_variables


class StateDictError(ValueError):
    """A state dict does not fit the model; `problems` lists each array that does not."""

    def __init__(self, problems: list[str]):
        places = f"{len(problems)} place{'s' if len(problems) > 1 else ''}"
        super().__init__(
            f"the state dict does not fit the model in {places}: {'; '.join(problems)}"
        )
        self.problems = problems


def from_torch(state_dict: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """Converts a published state dict to Flax variables; the inverse of `to_torch`.

    Args:
      state_dict: torch tensors or NumPy arrays under the published names. Names that end like one
        in `Model.torch_ignored` are ignored.
      model: the architecture of the arrays.

    Returns:
      {"params": ..., "batch_stats": ... if there are statistics}, float32 NumPy arrays.

    Raises:
      ValueError: the model has no published names; see `Model.torch_entries`.
      StateDictError: lists every missing or surplus name (surplus first if they are names of the
        model after a prefix) and every value that is not an array or has another shape; if there
        are none, every shared array whose copies differ.
    """
    # Broadcast zeros have the right shapes but take no memory.
    zeros = jax.tree.map(
        lambda s: np.broadcast_to(np.float32(0), s.shape), abstract_variables(model)
    )
    expected = to_torch(zeros, model)
    given = {
        name: value
        for name, value in state_dict.items()
        if not str(name).endswith(model.torch_ignored)
    }
    problems, arrays = [], {}
    for name, template in expected.items():
        array = _to_numpy(given.get(name))
        if name not in given:
            problems.append(f"missing {name}")
        elif array is None:
            problems.append(f"{name} is not an array of numbers")
        elif array.shape != template.shape:
            problems.append(f"{name} has shape {array.shape}, expected {template.shape}")
        else:
            arrays[name] = array
    surplus = [name for name in given if name not in expected]
    named = [f"surplus {_printable(name)}" for name in surplus]
    # Names after an unknown prefix explain why others are missing.
    problems = named + problems if _prefixed(surplus, expected) else problems + named
    if not problems:
        variables, problems = _gather(arrays, model)
    if problems:
        raise StateDictError(problems)
    return variables


def to_torch(variables: Mapping[str, Any], model: Model) -> dict[str, np.ndarray]:
    """Converts Flax variables to the published state dict; the inverse of `from_torch`.

    Args:
      variables: those of `model`.
      model: the architecture of the variables.

    Returns:
      NumPy arrays under the published names, including the copies of shared blocks.

    Raises:
      ValueError: the model has no published names; see `Model.torch_entries`.
    """
    state_dict = {}
    for entry in model.torch_entries():
        leaf: Any = variables
        for key in entry.path:
            leaf = leaf[key]
        array = np.asarray(leaf) if entry.row is None else np.asarray(leaf[entry.row])
        state_dict[entry.torch_name] = np.asarray(entry.layout.to_torch(array), order="C")
    return state_dict


def _gather(given: dict[str, np.ndarray], model: Model) -> tuple[dict[str, Any], list[str]]:
    """Fills the Flax tree from checked torch arrays; lists shared copies that differ."""
    problems, source = [], {}
    flat: dict[tuple[str, ...], Any] = {}
    for entry in model.torch_entries():
        array = np.asarray(entry.layout.to_flax(given[entry.torch_name]), order="C")
        if entry.row is not None:
            flat.setdefault(entry.path, []).append(array)
        elif entry.path not in flat:
            flat[entry.path], source[entry.path] = array, entry.torch_name
        elif not np.array_equal(flat[entry.path], array):
            problems.append(
                f"{entry.torch_name} differs from {source[entry.path]}, its shared copy"
            )
    variables: dict[str, Any] = {}
    for path, array in flat.items():
        node = variables
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = np.stack(array) if isinstance(array, list) else array
    return variables, problems


def _to_numpy(value: Any) -> np.ndarray | None:
    """The value as a float32 array; None if it is not an array of numbers."""
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu().float().numpy()
        return np.asarray(value, np.float32)
    except (TypeError, ValueError, RuntimeError):
        return None


def _prefixed(surplus: Iterable[Any], expected: Mapping[str, Any]) -> bool:
    """Whether some names are expected ones after a prefix, such as encoder.head.bias."""
    return any(str(name).endswith(tuple(f".{known}" for known in expected)) for name in surplus)


def _printable(name: Any) -> str:
    """A name from a file, quoted if it contains characters that a terminal would interpret."""
    return name if isinstance(name, str) and name.isprintable() else repr(name)
