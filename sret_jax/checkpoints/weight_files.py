"""Files of weights under the published PyTorch names: .pth, .pt and .safetensors."""

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from sret_jax.errors import UserError

TORCH_SUFFIXES = (".pth", ".pt")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors")


def read_state_dict(path: epath.Path) -> dict[str, Any]:
    """The state dict in a file, freed of the wrappers that training scripts put around it.

    Returns:
      Torch tensors or NumPy arrays by name.

    Raises:
      UserError: the file is unreadable, would run code, or holds no state dict.
    """
    content = _read(path)
    for wrapper in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} holds no state dict; expected names and arrays")
    return {key.removeprefix("module."): value for key, value in content.items()}


def write_state_dict(path: epath.Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by name, in the format that the file's suffix says.

    Raises:
      UserError: a torch file, and torch is not installed.
    """
    if path.suffix in TORCH_SUFFIXES:
        torch = import_torch()
        tensors = {key: torch.from_numpy(array.copy()) for key, array in state_dict.items()}
        with path.open("wb") as f:
            torch.save({"model": tensors}, f)
    else:
        from safetensors.numpy import save

        path.write_bytes(save(dict(state_dict)))


def read_torch(path: epath.Path) -> Any:
    """What a torch file holds; it is only ever read with weights_only: it cannot run code.

    Raises:
      UserError: torch is not installed, or the file is damaged or holds more than plain weights.
    """
    torch = import_torch()
    try:
        # DeiT-style training checkpoints carry their command line.
        allowed = [argparse.Namespace, *_array_types()]
        with path.open("rb") as f, torch.serialization.safe_globals(allowed):
            return torch.load(f, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged file raises almost anything
        reason = (str(e) or repr(e)).splitlines()[0]
        raise UserError(
            f"{path} is no torch file of plain weights and was not loaded ({reason}); save its "
            "state dict alone with torch.save"
        ) from e


def import_torch() -> Any:
    """The torch module; raises UserError where it is not installed."""
    try:
        import torch
    except ImportError as e:
        raise UserError(
            "torch is not installed, which .pth files need; pip install torch, or use a "
            ".safetensors file"
        ) from e
    return torch


def _array_types() -> list[Any]:
    """What torch must know of NumPy to load arrays of numbers, and no more than that."""
    from numpy._core.multiarray import _reconstruct

    kinds = [type(np.dtype(name)) for name in ("f2", "f4", "f8", "i4", "i8", "u1", "?")]
    by_numpy_1 = (_reconstruct, "numpy.core.multiarray._reconstruct")
    return [_reconstruct, by_numpy_1, np.ndarray, np.dtype, *kinds]


def _read(path: epath.Path) -> Any:
    if path.suffix in TORCH_SUFFIXES:
        return read_torch(path)
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(path.read_bytes())
    except SafetensorError as e:
        raise UserError(f"{path} is no readable safetensors file ({e})") from e
    except KeyError as e:  # a type that NumPy has not
        raise UserError(f"{path} holds arrays of type {e.args[0]}; save them as F32") from e
