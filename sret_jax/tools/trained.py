"""The trained model named on a command line, and the names of its classes."""

import argparse
import dataclasses
from typing import Any

import jax
from etils import epath

from sret_jax.cli import path_argument, weights_argument
from sret_jax.data.sources.classes import difference
from sret_jax.data.sources.imagenet import CLASSES as IMAGENET_CLASSES
from sret_jax.data.sources.imagenet import display_names, imagenet_ids
from sret_jax.errors import UserError
from sret_jax.models.checks import check_exit
from sret_jax.models.halting import ExitRule
from sret_jax.models.model import Model
from sret_jax.parallel.distributed import say
from sret_jax.weights.loading import find
from sret_jax.weights.packaged import packaged_names
from sret_jax.weights.stored import Stored


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model and what is needed to use it.

    Attributes:
      model, variables: from `sret_jax.load`.
      classes: a name to show for each logit (English for ImageNet), or else its number.
      test_crop: fraction of an image's shorter side that the model sees.
      variant: the published variant that the model is, or was made from.
    """

    model: Model
    variables: dict[str, Any]
    classes: list[str]
    test_crop: float
    variant: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `open_trained` reads."""
    parser.add_argument(
        "--checkpoint",
        type=weights_argument,
        required=True,
        metavar="PATH",
        help="a run, one of its steps (RUN/checkpoints/120), a converted folder, a weight file, "
        "hf://OWNER/NAME on the Hugging Face hub, or a name: " + ", ".join(packaged_names()),
    )
    parser.add_argument("--ema", action="store_true", help="use the moving average of the weights")
    parser.add_argument(
        "--unsliced", action="store_true", help="published weights trained without slices"
    )
    parser.add_argument(
        "--classes",
        type=path_argument,
        metavar="FILE",
        help="class names, one per line, in the order of the logits; default: the run's own",
    )


def add_exit_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the argument that `exit_rule` reads."""
    parser.add_argument(
        "--exit",
        metavar="RULE",
        help="when an image leaves the last block: entropy:T (nats), confidence:P, stable, "
        "residual:R; default: after all loops",
    )


def exit_rule(args: argparse.Namespace, model: Model) -> ExitRule | None:
    """The rule by which images leave the model early, if --exit names one.

    Raises:
      UserError: there is no such rule, or no image of this model can leave by it.
    """
    if not args.exit:
        return None
    rule = ExitRule.parse(args.exit)
    check_exit(model, rule)
    return rule


def open_trained(args: argparse.Namespace) -> Trained:
    """Loads the model that the arguments name.

    Raises:
      UserError: `sret_jax.load` raises it, or the file of names does not have one name per logit,
        or has the run's own names in another order.
    """
    settings = {"groups": None} if args.unsliced else {}
    stored = find(args.checkpoint, ema=args.ema)
    model, variables = stored.load(**settings)
    return Trained(
        model,
        jax.device_put(variables, jax.local_devices()[0]),
        _classes(stored, args.classes, model.num_classes),
        stored.test_crop,
        stored.variant(model),
    )


def _classes(stored: Stored, file: epath.Path | None, count: int) -> list[str]:
    """A name to show for each logit; prints a sentence if the checkpoint contains no names."""
    kept = stored.class_names
    if file is not None:
        return _read_names(file, stored.place, kept, count)
    if kept is None and count == IMAGENET_CLASSES:
        say(f"{stored.place} keeps no class names; its 1,000 are taken for ImageNet's.")
        kept = imagenet_ids()
    elif kept is None:
        say(
            f"{stored.place} keeps no class names, so classes are shown by number; --classes=FILE "
            "gives names."
        )
    names = display_names(kept or [])
    return names + [str(label) for label in range(len(names), count)]


def _read_names(
    file: epath.Path, checkpoint: epath.Path, kept: list[str] | None, count: int
) -> list[str]:
    """The lines of a file without blank ones, if they can be the names of these logits."""
    try:
        text = file.read_bytes().decode("utf-8-sig")  # Windows editors write a byte order mark
    except (OSError, ValueError) as e:
        raise UserError(f"--classes={file} cannot be read ({e}); give a UTF-8 text file") from e
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if len(names) != count:
        raise UserError(
            f"--classes={file} has {len(names):,} names, but {checkpoint} has {count:,} classes; "
            "give one name per line, in the order of the logits"
        )
    if kept and sorted(names) == sorted(kept) and (differs := difference(kept, names)):
        raise UserError(
            f"--classes={file} has the names of {checkpoint} in another order: {differs}; leave "
            "it out, or give the order of the logits"
        )
    return display_names(names)
