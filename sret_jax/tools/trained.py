"""The trained model that a command is given, and the names of its classes."""

import argparse
import dataclasses
from typing import Any

from etils import epath

from sret_jax.errors import UserError
from sret_jax.files import absolute
from sret_jax.models.sret import SReT
from sret_jax.training.pretrained import class_names, load, test_crop


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model, its weights, and what they were trained and evaluated on.

    Attributes:
      model, variables: as `sret_jax.load` gives them.
      classes: a name for each logit; its number where there is none.
      test_crop: the share of an image's shorter side that is seen.
    """

    model: SReT
    variables: dict[str, Any]
    classes: list[str]
    test_crop: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `open_trained` reads."""
    parser.add_argument(
        "--checkpoint",
        type=absolute,
        required=True,
        metavar="PATH",
        help="a run, one of its steps (RUN/checkpoints/120), a converted folder or a weight file",
    )
    parser.add_argument("--ema", action="store_true", help="take a run's averaged weights")
    parser.add_argument(
        "--unsliced", action="store_true", help="published weights trained without slices"
    )
    parser.add_argument(
        "--classes",
        type=absolute,
        metavar="FILE",
        help="class names, one a line, in the order of the logits; default: the run's own",
    )


def open_trained(args: argparse.Namespace) -> Trained:
    """Loads what the arguments name.

    Raises:
      UserError: see `sret_jax.load`; or a file of class names of another length.
    """
    settings = {"groups": None} if args.unsliced else {}
    model, variables = load(args.checkpoint, ema=args.ema, **settings)
    return Trained(
        model,
        variables,
        _classes(args.checkpoint, args.classes, model.num_classes),
        test_crop(args.checkpoint),
    )


def _classes(checkpoint: epath.Path, file: epath.Path | None, count: int) -> list[str]:
    if file is None:
        names = class_names(checkpoint) or []
        return names + [str(label) for label in range(len(names), count)]
    try:
        names = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as e:
        raise UserError(f"--classes={file} cannot be read ({e}); give a text file") from e
    if len(names) != count:
        raise UserError(
            f"--classes={file} has {len(names):,} lines, but {checkpoint} has {count:,} classes; "
            "give one name a line, in the order of the logits"
        )
    return names
