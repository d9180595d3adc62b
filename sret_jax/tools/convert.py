"""Converts weights between published PyTorch files and checkpoint folders, either way.

python -m sret_jax.tools.convert SReT_S.pth converted/ --model=sret_s
python -m sret_jax.tools.convert runs/quickstart digits.safetensors
"""

import argparse
import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from sret_jax.checkpoints.manager import Checkpoints, read_weights, saved_shapes
from sret_jax.checkpoints.torch_names import StateDictError, from_torch, to_torch
from sret_jax.cli import clear_errors, quiet_libraries
from sret_jax.errors import UserError, few
from sret_jax.files import absolute
from sret_jax.models.sret import STEM_STRIDE, SReT, abstract_variables, create_model
from sret_jax.models.variants import list_models
from sret_jax.parallel.mesh import with_shardings
from sret_jax.training.config_model import create_from_config
from sret_jax.training.saved_config import CONFIG_FILE, load_config

TORCH_SUFFIXES = (".pth", ".pt")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sret_jax.tools.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="IN", type=absolute, help="a weight file or a folder")
    parser.add_argument("target", metavar="OUT", type=absolute, help="the other of the two")
    parser.add_argument(
        "--model", help=f"one of {', '.join(list_models())}; default: as the folder's config says"
    )
    parser.add_argument("--ema", action="store_true", help="take a run's averaged weights")
    args = parser.parse_args(argv)
    quiet_libraries()
    with clear_errors():
        if args.target.exists():
            raise UserError(f"{args.target} exists already; give another OUT or remove it")
        args.target.parent.mkdir(parents=True, exist_ok=True)
        if args.source.suffix in SUFFIXES and args.source.is_file():
            file_to_folder(args.source, args.target, args.model)
        elif args.target.suffix in SUFFIXES and args.source.is_dir():
            folder_to_file(args.source, args.target, args.model, ema=args.ema)
        else:
            raise UserError(
                f"cannot convert {args.source} to {args.target}: one must be an existing folder or "
                f"file and the other a path of the other kind ({', '.join(SUFFIXES)})"
            )
    print(f"Written: {args.target}")


def file_to_folder(source: epath.Path, target: epath.Path, model_name: str | None) -> None:
    """Writes a checkpoint folder from a published weight file.

    Raises:
      UserError: no --model, an unreadable file, or arrays that are not that model's.
    """
    if model_name is None:
        raise UserError(f"give --model, one of {', '.join(list_models())}")
    state_dict = _unwrap(_read_file(source), source)
    try:
        model = _model_like(model_name, state_dict)
        variables = from_torch(state_dict, model)
    except StateDictError as e:
        raise UserError(
            f"{source} does not fit {model_name}: {few(e.problems)}; give the --model it is of"
        ) from e
    except ValueError as e:
        raise UserError(f"{source}: {e}") from e
    with contextlib.closing(Checkpoints(target)) as checkpoints:
        checkpoints.save(0, {"model": jax.tree.map(jnp.asarray, variables)})
        if not checkpoints.settle():
            raise UserError(f"{target} takes no checkpoint; mend the storage or convert elsewhere")


def folder_to_file(
    source: epath.Path, target: epath.Path, model_name: str | None, *, ema: bool
) -> None:
    """Writes a weight file under the published names from a run or converted checkpoint.

    Raises:
      UserError: no --model where there is no config, no readable checkpoint, one that is not that
        model's, or a model without published names.
    """
    model, name = _model_of_folder(source, model_name), "eval_ema" if ema else "eval"
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = abstract_variables(model)
    targets = with_shardings(shapes, jax.tree.map(lambda _: here, shapes))
    step, weights = read_weights(source, targets)
    if name not in weights:
        raise UserError(f"{source} holds no averaged weights; leave out --ema")
    print(f"Read step {step} of {source}")
    try:
        state_dict = to_torch(jax.device_get(weights[name]), model)
    except ValueError as e:
        raise UserError(f"{source}: {e}") from e
    if target.suffix in TORCH_SUFFIXES:
        torch = _import_torch()
        tensors = {key: torch.from_numpy(array.copy()) for key, array in state_dict.items()}
        with target.open("wb") as f:
            torch.save({"model": tensors}, f)
    else:
        from safetensors.numpy import save

        target.write_bytes(save(state_dict))


def _read_file(path: epath.Path) -> Any:
    """A torch file is only ever read with weights_only: it cannot run code."""
    if path.suffix not in TORCH_SUFFIXES:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            return load(path.read_bytes())
        except SafetensorError as e:
            raise UserError(f"{path} is no readable safetensors file ({e})") from e
        except KeyError as e:  # a type that NumPy has not
            raise UserError(f"{path} holds arrays of type {e.args[0]}; save them as F32") from e
    torch = _import_torch()
    try:
        # DeiT-style training checkpoints carry their command line.
        with path.open("rb") as f, torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(f, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged file raises almost anything
        reason = (str(e) or repr(e)).splitlines()[0]
        raise UserError(
            f"{path} is no torch file of plain weights and was not loaded ({reason}); save its "
            "state dict alone with torch.save"
        ) from e


def _unwrap(content: Any, path: epath.Path) -> dict[str, Any]:
    """The state dict inside the wrappers that training scripts put around it."""
    for wrapper in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} holds no state dict; expected names and arrays")
    return {key.removeprefix("module."): value for key, value in content.items()}


def _model_like(name: str, state_dict: Mapping[str, Any]) -> SReT:
    """The variant with the classes and image size that the arrays show."""
    head, position = (
        getattr(state_dict.get(array), "shape", ()) for array in ("head.weight", "pos_embed")
    )
    sizes = {}
    if head:
        sizes["num_classes"] = head[0]
    if position:
        sizes["image_size"] = position[-1] * STEM_STRIDE
    return create_model(name, groups=None, **sizes)


def _model_of_folder(source: epath.Path, name: str | None) -> SReT:
    """The model a folder's arrays are of: as its config says, or the variant of that name."""
    shapes = saved_shapes(source)
    try:
        (num_classes,) = shapes["params/head/bias"]
        _, side, _, _ = shapes["params/pos_embed"]
    except (KeyError, ValueError) as e:
        raise UserError(f"{source} holds no weights of a SReT; give the folder of a run") from e
    if name is not None:
        image_size = side * STEM_STRIDE
        try:
            return create_model(name, groups=None, num_classes=num_classes, image_size=image_size)
        except ValueError as e:
            raise UserError(str(e)) from e
    config = load_config(source)
    if config is None:
        raise UserError(
            f"{source} has no config.json; give --model, one of {', '.join(list_models())}"
        )
    try:
        return create_from_config(config, num_classes)
    except (AttributeError, KeyError, TypeError) as e:
        raise UserError(f"{source / CONFIG_FILE} describes no model ({e}); give --model") from e


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as e:
        raise UserError(
            "torch is not installed, which .pth files need; pip install torch, or use a "
            ".safetensors file"
        ) from e
    return torch


if __name__ == "__main__":
    main()
