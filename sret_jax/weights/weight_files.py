"""Reads and writes files of weights under the published PyTorch names: torch or safetensors."""

import argparse
import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from sret_jax.errors import UserError
from sret_jax.models.registry import renamed

TORCH_SUFFIXES = (".pth", ".pt")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors")  # for writing; files with any suffix can be read

RAW = ("model", "state_dict", "model_state_dict")  # keys that training scripts put weights under
AVERAGED = ("model_ema", "state_dict_ema", "ema_state_dict")
DESCRIPTION = "sret_jax"  # key of the description in files written here
COUNTERS = ("num_batches_tracked", "n_averaged")

ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # first bytes of torch files since 1.6, and before
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
REFUSED_TYPE = re.compile(r"GLOBAL ([\w.]+)")


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """The contents of a weight file.

    Attributes:
      state_dict: torch tensors or NumPy arrays by name, without wrappers and shared prefixes;
        names are those of `Model.torch_entries`.
      description: the description of the weights, if the file was written here.
      taken: a sentence about the choice, if the file contains several sets of weights; or "".
    """

    state_dict: dict[str, Any]
    description: Any = None
    taken: str = ""


def read_weight_file(path: epath.Path, *, ema: bool = False) -> WeightFile:
    """Reads a torch or safetensors file; the format is recognised by the content.

    Args:
      path: path of the file.
      ema: reads the averaged weights that a training script stored beside the raw ones.

    Raises:
      UserError: the file is unreadable, would run code, or has no (averaged) state dict.
    """
    content, description = _read(path)
    state_dict, key, others = _choose(path, content, ema)
    if not isinstance(state_dict, Mapping) or not all(isinstance(name, str) for name in state_dict):
        raise UserError(f"{path} holds no state dict; expected names and arrays")
    named = {n: array for n, array in state_dict.items() if not n.endswith(COUNTERS)}
    taken = f"{path} holds {' and '.join([key, *others])}: {key} is taken." if others else ""
    return WeightFile(dict(renamed(without_shared_prefix(named))), description, taken)


def write_weight_file(
    path: epath.Path, state_dict: Mapping[str, np.ndarray], description: Mapping[str, Any]
) -> None:
    """Writes arrays by name with a description, in the format of the file's suffix.

    Args:
      path: ends in one of SUFFIXES.
      state_dict: arrays under the published names.
      description: values that JSON can represent.

    Raises:
      UserError: the file is a torch file, and torch is not installed.
    """
    text = json.dumps(description, ensure_ascii=False)
    if path.suffix in TORCH_SUFFIXES:
        torch = import_torch()
        tensors = {key: torch.from_numpy(array.copy()) for key, array in state_dict.items()}
        with path.open("wb") as f:
            torch.save({"model": tensors, DESCRIPTION: text}, f)
    else:
        from safetensors.numpy import save

        path.write_bytes(save(dict(state_dict), metadata={DESCRIPTION: text}))


def read_torch(path: epath.Path) -> Any:
    """Reads a torch file, always with weights_only, so that it cannot run code.

    Raises:
      UserError: torch is not installed, or the file is damaged or contains more than plain data.
    """
    torch = import_torch()
    try:
        with path.open("rb") as f, torch.serialization.safe_globals(_harmless_types()):
            return torch.load(f, map_location="cpu", weights_only=True)
    except Exception as e:  # torch may raise anything on a damaged file
        raise UserError(
            f"{path} is not a torch file of plain weights and was not loaded ({_reason(e)}); save "
            "its state dict alone with torch.save"
        ) from e


def import_torch() -> Any:
    """Imports torch; raises UserError if it is not installed."""
    try:
        import torch
    except ImportError as e:
        raise UserError(
            "torch files (.pth, ...) need torch, which is not installed; pip install torch, or use "
            "a .safetensors file"
        ) from e
    return torch


def without_shared_prefix(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Removes the prefix that wrappers add to every name: module._orig_mod.head.bias -> head.bias.

    The name of a layer is not a prefix: a file with only head.weight and head.bias keeps them.
    """
    while True:
        first = {name.partition(".")[0] for name in arrays}
        inner = {name.partition(".")[2]: array for name, array in arrays.items()}
        if len(first) != 1 or not any("." in name for name in inner):
            return dict(arrays)
        arrays = inner


def _choose(path: epath.Path, content: Any, ema: bool) -> tuple[Any, str, list[str]]:
    """Chooses a state dict from a file's content; returns it, its key, and the keys of others."""
    keys = [
        key
        for key in (*RAW, *AVERAGED)
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)
    ]
    wanted = [key for key in keys if key in AVERAGED] if ema else keys
    if ema and not wanted:
        raise UserError(
            f"{path} holds no averaged weights ({', '.join(AVERAGED)}); leave out ema, or set "
            "config.init_ema=False"
        )
    if not wanted:
        return content, "", []
    key = wanted[0]
    inner, _, _ = _choose(path, content[key], ema=False)
    return inner, key, [other for other in keys if other != key]


def _read(path: epath.Path) -> tuple[Any, Any]:
    """Reads the content of a file and its description."""
    with path.open("rb") as f:
        start = f.read(64)
    if start[8:9] == b"{":  # a safetensors header follows its length of 8 bytes
        content, metadata = _read_safetensors(path)
        return content, _parse(path, metadata.get(DESCRIPTION))
    if start.startswith((ZIP, PICKLE)):
        content = read_torch(path)
        text = content.get(DESCRIPTION) if isinstance(content, Mapping) else None
        return content, _parse(path, text)
    raise UserError(
        f"{path} is neither a torch file nor safetensors (it begins with {start[:32]!r}); give a "
        "file of weights, or the folder of a run"
    )


def _read_safetensors(path: epath.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    data = path.read_bytes()
    try:
        arrays = load(data)
    except SafetensorError as e:
        raise UserError(f"{path} is not a readable safetensors file ({e})") from e
    except KeyError as e:  # a type that NumPy does not have
        raise UserError(f"{path} holds arrays of type {e.args[0]}; save them as F32") from e
    length = int.from_bytes(data[:8], "little")
    return arrays, json.loads(data[8 : 8 + length]).get("__metadata__", {})


def _parse(path: epath.Path, text: Any) -> Any:
    if text is None:
        return None
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as e:
        raise UserError(
            f"the description ({DESCRIPTION}) in {path} is damaged ({e}); write it again"
        ) from e


def _reason(error: Exception) -> str:
    """The reason why torch refused a file, in one line without terminal codes."""
    text = ESCAPES.sub("", str(error) or repr(error))
    if refused := REFUSED_TYPE.search(text):
        return f"it holds a {refused[1]}, which could run code"
    _, _, cause = text.rpartition("WeightsUnpickler error:")
    line = cause.strip().splitlines()[0]
    return line if line.isprintable() else repr(line)


def _plain_dict(factory: Any = None) -> dict[Any, Any]:
    del factory
    return {}


def _harmless_types() -> list[Any]:
    """Types that training scripts store beside weights and that cannot run code.

    Paths are read as pure paths, which every system supports.
    """
    from numpy._core.multiarray import _reconstruct, scalar

    numbers = "f2 f4 f8 i1 i2 i4 i8 u1 u2 u4 u8 ? U1 S1"
    numpy_1 = "numpy.core.multiarray"
    posix, windows = pathlib.PurePosixPath, pathlib.PureWindowsPath
    return [
        *(argparse.Namespace, dict, float, int, list, set, str),
        (_plain_dict, "collections.defaultdict"),  # torch would leave it empty
        *(_reconstruct, scalar, np.ndarray, np.dtype),
        *((_reconstruct, f"{numpy_1}._reconstruct"), (scalar, f"{numpy_1}.scalar")),
        *(type(np.dtype(name)) for name in numbers.split()),
        *(
            (kind, f"{module}.{name}")
            for module in ("pathlib", "pathlib._local")  # the latter is used by Python 3.13
            for kind, names in (
                (posix, ("PosixPath", "PurePosixPath")),
                (windows, ("WindowsPath", "PureWindowsPath")),
            )
            for name in names
        ),
    ]
