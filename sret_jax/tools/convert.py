"""Converts weights between published PyTorch files and checkpoint folders, either way.

python -m sret_jax.tools.convert SReT_S.pth converted/
python -m sret_jax.tools.convert runs/quickstart digits.safetensors
"""

import argparse
import contextlib

import jax
import jax.numpy as jnp
from etils import epath

from sret_jax.checkpoints.manager import Checkpoints
from sret_jax.checkpoints.torch_names import to_torch
from sret_jax.checkpoints.weight_files import SUFFIXES, write_weight_file
from sret_jax.cli import clear_errors, quiet_libraries
from sret_jax.errors import UserError
from sret_jax.files import absolute
from sret_jax.models.variants import list_models
from sret_jax.training.pretrained import load_on_host


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
        "--model", help=f"one of {', '.join(list_models())}; default: found from what IN holds"
    )
    parser.add_argument("--ema", action="store_true", help="take a run's averaged weights")
    args = parser.parse_args(argv)
    quiet_libraries()
    with clear_errors():
        if args.target.exists():
            raise UserError(f"{args.target} exists already; give another OUT or remove it")
        args.target.parent.mkdir(parents=True, exist_ok=True)
        if not args.source.exists():
            raise UserError(f"there is no {args.source}; correct the path")
        if args.source.is_file():
            file_to_folder(args.source, args.target, args.model, ema=args.ema)
        elif args.target.suffix in SUFFIXES and args.source.is_dir():
            folder_to_file(args.source, args.target, args.model, ema=args.ema)
        else:
            raise UserError(
                f"cannot convert {args.source} to {args.target}: one must be an existing folder or "
                f"file and the other a path of the other kind ({', '.join(SUFFIXES)})"
            )
    print(f"Written: {args.target}")


def file_to_folder(
    source: epath.Path, target: epath.Path, name: str | None, *, ema: bool = False
) -> None:
    """Writes a checkpoint folder from a published weight file.

    Raises:
      UserError: an unreadable file, or arrays that are not that model's, or no known model's.
    """
    # Without groups, images of any size will do.
    _, variables = load_on_host(source, ema=ema, name=name, groups=None)
    with contextlib.closing(Checkpoints(target)) as checkpoints:
        checkpoints.save(0, {"model": jax.tree.map(jnp.asarray, variables)})
        if not checkpoints.settle():
            raise UserError(f"{target} takes no checkpoint; mend the storage or convert elsewhere")


def folder_to_file(source: epath.Path, target: epath.Path, name: str | None, *, ema: bool) -> None:
    """Writes a weight file under the published names from a run or converted checkpoint.

    Raises:
      UserError: no readable checkpoint, one that is not that model's, or a model without
        published names.
    """
    model, variables = load_on_host(source, ema=ema, name=name)
    try:
        write_weight_file(target, to_torch(variables, model), {})
    except ValueError as e:
        raise UserError(f"{source}: {e}") from e


if __name__ == "__main__":
    main()
