"""The published PyTorch names and layouts of all SReT arrays, converted in both directions.

The published state dict lists applications rather than blocks: `transformers.{stage}.blocks.{j}`
alternates F, NLL, F, NLL, ..., so loop l of block b is j = 2*(b*loops + l) and its NLL is j + 1. A
block shared by several loops is contained once per loop.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from sret_jax.models.families.sret import SReT, abstract_variables


@dataclasses.dataclass(frozen=True)
class Layout:
    """The order of an array's axes in torch and in Flax, as two inverse functions."""

    to_flax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


def _pool_to_flax(w: np.ndarray, channels: int) -> np.ndarray:
    return w.reshape(channels, -1, 3, 3).transpose(2, 3, 0, 1)  # (3, 3, C, m)


def _pool_to_torch(w: np.ndarray) -> np.ndarray:
    return w.transpose(2, 3, 0, 1).reshape(-1, 1, 3, 3)  # (C*m, 1, 3, 3)


SAME = Layout(lambda w: w, lambda w: w)
LINEAR = Layout(lambda w: w.T, lambda w: w.T)  # (out, in) <-> (in, out)
CONV = Layout(lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))  # OIHW <-> HWIO
SCALAR = Layout(lambda w: w.reshape(()), lambda w: w.reshape(1))
POSITION = Layout(lambda w: w.transpose(0, 2, 3, 1), lambda w: w.transpose(0, 3, 1, 2))  # NCHW


@dataclasses.dataclass(frozen=True)
class Entry:
    """One torch array: its name, and the Flax leaf (and loop, for NLLs) that it corresponds to."""

    torch_name: str
    path: tuple[str, ...]
    layout: Layout
    loop: int | None = None


def _affine(torch: str, path: tuple[str, ...], layout: Layout, scale: str) -> Iterator[Entry]:
    yield Entry(f"{torch}.weight", (*path, scale), layout)
    yield Entry(f"{torch}.bias", (*path, "bias"), SAME)


def _norm(torch: str, path: tuple[str, ...]) -> Iterator[Entry]:
    return _affine(torch, path, SAME, "scale")


def _linear(torch: str, path: tuple[str, ...]) -> Iterator[Entry]:
    return _affine(torch, path, LINEAR, "kernel")


def _residual(torch: str, first: int, path: tuple[str, ...]) -> Iterator[Entry]:
    yield Entry(f"{torch}.coefficient{first}.bias", (*path, "skip"), SCALAR)
    yield Entry(f"{torch}.coefficient{first + 1}.bias", (*path, "branch"), SCALAR)


def _shared_block(torch: str, path: tuple[str, ...]) -> Iterator[Entry]:
    yield from _norm(f"{torch}.norm1", (*path, "norm1"))
    yield from _linear(f"{torch}.attn.qkv", (*path, "attn", "qkv"))
    yield from _linear(f"{torch}.attn.proj", (*path, "attn", "proj"))
    yield from _residual(torch, 1, (*path, "attn_residual"))
    yield from _norm(f"{torch}.norm2", (*path, "norm2"))
    yield from _linear(f"{torch}.mlp.fc1", (*path, "mlp", "fc1"))
    yield from _linear(f"{torch}.mlp.fc2", (*path, "mlp", "fc2"))
    yield from _residual(torch, 3, (*path, "mlp_residual"))


def _nll(torch: str, path: tuple[str, ...], loop: int) -> Iterator[Entry]:
    entries = (
        *_norm(f"{torch}.norm1", (*path, "norm")),
        *_linear(f"{torch}.mlp.fc1", (*path, "mlp", "fc1")),
        *_linear(f"{torch}.mlp.fc2", (*path, "mlp", "fc2")),
        *_residual(torch, 1, (*path, "residual")),
    )
    yield from (dataclasses.replace(entry, loop=loop) for entry in entries)


def _batch_norm(torch: str, layer: str) -> Iterator[Entry]:
    yield from _norm(torch, ("params", "stem", layer))
    yield Entry(f"{torch}.running_mean", ("batch_stats", "stem", layer, "mean"), SAME)
    yield Entry(f"{torch}.running_var", ("batch_stats", "stem", layer, "var"), SAME)


def entries(model: SReT) -> Iterator[Entry]:
    """Every array of the published state dict of `model`; shared arrays appear once per loop.

    Raises:
      ValueError: some applications have no NLL, so there are no published names.
    """
    if model.nll_every > 1:
        raise ValueError(
            f"nll_every={model.nll_every} has no published names, in which an NLL follows every "
            "application; convert models with nll_every=1"
        )
    yield Entry("pos_embed", ("params", "pos_embed"), POSITION)
    for i in (1, 2, 3):
        yield from _affine(f"patch_embed.conv{i}", ("params", "stem", f"conv{i}"), CONV, "kernel")
        yield from _batch_norm(f"patch_embed.bn{i}", f"bn{i}")
    for s, blocks in enumerate(model.blocks):
        if s > 0:
            channels = model.widths[s - 1]
            pool = Layout(functools.partial(_pool_to_flax, channels=channels), _pool_to_torch)
            yield from _affine(f"pools.{s - 1}.conv", ("params", f"pool{s}"), pool, "kernel")
        for b in range(blocks):
            path = ("params", f"stage{s}_block{b}")
            for loop in range(model.loops):
                j = 2 * (b * model.loops + loop)
                yield from _shared_block(f"transformers.{s}.blocks.{j}", (*path, "block"))
                yield from _nll(f"transformers.{s}.blocks.{j + 1}", (*path, "nll"), loop)
    yield from _norm("norm", ("params", "norm"))
    yield from _linear("head", ("params", "head"))


class StateDictError(ValueError):
    """A state dict does not fit the model; `problems` lists each array that does not."""

    def __init__(self, problems: list[str]):
        places = f"{len(problems)} place{'s' if len(problems) > 1 else ''}"
        super().__init__(
            f"the state dict does not fit the model in {places}: {'; '.join(problems)}"
        )
        self.problems = problems


def from_torch(state_dict: Mapping[str, Any], model: SReT) -> dict[str, Any]:
    """Converts a published SReT state dict to Flax variables; the inverse of `to_torch`.

    Args:
      state_dict: torch tensors or NumPy arrays under the published names. Entries
        `num_batches_tracked` are ignored.
      model: the architecture of the arrays.

    Returns:
      {"params": ..., "batch_stats": ...}, float32 NumPy arrays.

    Raises:
      ValueError: the model has nll_every above 1.
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
        if not str(name).endswith("num_batches_tracked")
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


def to_torch(variables: Mapping[str, Any], model: SReT) -> dict[str, np.ndarray]:
    """Converts Flax variables to the published state dict; the inverse of `from_torch`.

    Args:
      variables: {"params": ..., "batch_stats": ...} of `model`.
      model: the architecture of the variables.

    Returns:
      NumPy arrays under the published names, including the copies of shared blocks.

    Raises:
      ValueError: the model has nll_every above 1.
    """
    state_dict = {}
    for entry in entries(model):
        leaf: Any = variables
        for key in entry.path:
            leaf = leaf[key]
        array = np.asarray(leaf) if entry.loop is None else np.asarray(leaf[entry.loop])
        state_dict[entry.torch_name] = np.asarray(entry.layout.to_torch(array), order="C")
    return state_dict


def _gather(given: dict[str, np.ndarray], model: SReT) -> tuple[dict[str, Any], list[str]]:
    """Fills the Flax tree from checked torch arrays; lists shared copies that differ."""
    problems, source = [], {}
    flat: dict[tuple[str, ...], Any] = {}
    for entry in entries(model):
        array = np.asarray(entry.layout.to_flax(given[entry.torch_name]), order="C")
        if entry.loop is not None:
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
