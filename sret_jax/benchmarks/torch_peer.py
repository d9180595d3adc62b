"""The PyTorch module that computes what a model of ours does: timm's, or our twin of it."""

import importlib
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch
from torch import nn

from sret_jax.benchmarks.torch_twin import TorchTwin
from sret_jax.errors import UserError, few
from sret_jax.models.families.sret import SReT
from sret_jax.models.model import Model
from sret_jax.models.model_settings import model_settings
from sret_jax.models.registry import create_model, variant
from sret_jax.weights.torch_names import StateDictError, from_torch

# The modules of families that timm does not have.
TWINS: Mapping[type[Model], Callable[..., nn.Module]] = MappingProxyType({SReT: TorchTwin})
# Settings that timm's module has too, or that do not change what a step computes.
FREE = {"num_classes", "image_size", "drop_path_rate", "branch_init", "mean", "std"}


def torch_peer(model: Model, name: str) -> nn.Module:
    """The module with the same arrays and the same work per image as `model`, with random weights.

    Args:
      model: the model to compare.
      name: the variant that it was made from, one of `list_models()`.

    Raises:
      UserError: there is no such module, or timm is needed and not installed.
    """
    twin = TWINS.get(type(model))
    peer = twin(model) if twin else timm_module(model, name)
    try:
        from_torch(peer.state_dict(), model)  # checks the names and shapes of all arrays
    except StateDictError as e:
        raise UserError(f"--against=torch: {name} is another network: {few(e.problems)}") from e
    except ValueError as e:
        raise UserError(f"--against=torch has no module for this model: {e}") from e
    return peer


def timm_module(model: Model, name: str) -> nn.Module:
    """The module of timm whose weights a published variant takes.

    Raises:
      UserError: timm is not installed, or has no such module.
    """
    architecture = variant(name).timm or variant(name).hub.partition(".")[0]
    if not architecture:
        raise UserError(f"--against=torch: timm does not have {name}; leave --against=torch out")
    ours, published = model_settings(model), model_settings(create_model(name))
    for key in ours.keys() - FREE:
        if ours[key] != published[key]:
            raise UserError(
                f"--against=torch measures timm's {architecture}, which has {key}={published[key]} "
                f"instead of {ours[key]}; set --config.model.{key}={published[key]}, or leave "
                "--against=torch out"
            )
    module: nn.Module = import_timm().create_model(
        architecture,
        num_classes=model.num_classes,
        img_size=model.image_size,
        drop_path_rate=model.drop_path_rate,
    )
    return module


def import_timm() -> Any:
    """Imports timm, which needs torchvision.

    Torchvision fails to load beside a torch for other devices, where its compiled operators are
    missing. Models need none of them, so then it is loaded without.

    Raises:
      UserError: timm or torchvision is not installed.
    """
    try:
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            for loaded in [key for key in sys.modules if key.partition(".")[0] == "torchvision"]:
                del sys.modules[loaded]
            with mock.patch.object(torch.library, "register_fake", lambda *_, **__: lambda f: f):
                importlib.import_module("torchvision")
        return importlib.import_module("timm")
    except ModuleNotFoundError as e:
        raise UserError(
            f"--against=torch needs {e.name}, which is not installed; pip install timm"
        ) from e
