"""Makes a trained model recursive: successive layers share their weights, with LoRA or without.

python -m sret_jax.tools.recur hf://timm/deit_tiny_patch16_224.fb_in1k OUT --loops=2 --lora=8
python -m sret_jax.tools.recur RUN OUT.safetensors --loops=3 --init=stepwise

IN is an untied model (loops=1). With --lora=R, each application adds a matrix of rank R to every
weight matrix of its block, the best approximation of the difference from its layer (truncated SVD),
and has the norms and biases of its layer. The change of every layer's output is printed, as seen on
the photographs that come with scikit-learn, or on --images.
"""

import jax
import numpy as np

from sret_jax.cli import Parser, clear_errors, path_argument, quiet_libraries, weights_argument
from sret_jax.errors import UserError
from sret_jax.evaluation.output_changes import output_changes, photographs
from sret_jax.evaluation.predict import views
from sret_jax.models.model import Model
from sret_jax.models.model_settings import changed_settings
from sret_jax.models.registry import title
from sret_jax.models.tying import STARTS, other_turns, tied
from sret_jax.models.variables import Variables
from sret_jax.terminal import Progress
from sret_jax.text import table
from sret_jax.tools.predict import find_images
from sret_jax.weights.description import Description
from sret_jax.weights.loading import find
from sret_jax.weights.writing import check_free, write_weights

MOST_IMAGES = 32


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = Parser.of("recur", __doc__)
    parser.add_argument("source", metavar="IN", type=weights_argument, help="an untied model")
    parser.add_argument(
        "target", metavar="OUT", type=path_argument, help="a new folder or weight file"
    )
    parser.add_argument(
        "--loops", type=int, default=2, help="layers that share their weights; default: 2"
    )
    parser.add_argument(
        "--init",
        help="the weights of a shared block: the average of its layers, those of the first, or "
        "those of one layer, chosen stepwise; default: average with --lora, otherwise stepwise",
        choices=STARTS,
    )
    parser.add_argument("--lora", type=int, default=0, metavar="R", help="rank; default: no LoRA")
    parser.add_argument("--ema", action="store_true", help="use the moving average of the weights")
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="IMAGE",
        help=f"files or folders, of which {MOST_IMAGES} images are taken",
    )
    args = parser.parse_args(argv)
    quiet_libraries()
    with clear_errors():
        check_free(args.target)
        if args.lora < 0:
            raise UserError(f"--lora={args.lora} must be a rank of at least 1, or be left out")
        start = args.init or ("average" if args.lora else "stepwise")
        stored = find(args.source, ema=args.ema)
        model, variables = stored.load()
        try:
            with Progress("Tying layers"):
                new, weights = tied(model, variables, args.loops, start=start, rank=args.lora)
        except ValueError as e:
            raise UserError(f"{args.source}: {e}") from e
        variant = stored.variant(model)
        if other := next(other_turns(new, model), ""):
            print(f"{other}, so the function changes even with LoRA of full rank.")
        chosen = find_images(args.images)[:MOST_IMAGES] if args.images else photographs()
        images = views(chosen, model.image_size, stored.test_crop)
        print_changes((model, variables), (new, weights), images)
        description = Description.of(new, variant, stored.class_names, stored.test_crop)
        write_weights(args.target, new, weights, description, stored.origin)
    print(f"Written: {args.target} ({title(new, variant)})")
    settings = {name: value for name, (_, value) in changed_settings(model, new).items()}
    flags = " ".join(f'--config.model.{name}="{value}"' for name, value in settings.items())
    print(f"To train it further: --config.init_from={args.target} {flags}")


def print_changes(
    old: tuple[Model, Variables], new: tuple[Model, Variables], images: np.ndarray
) -> None:
    """Prints the number of parameters, and what changes at the output of each layer.

    Args:
      old: an untied model and its weights.
      new: the recursive model made of it, and its weights.
      images: (B, S, S, 3) uint8.
    """
    before, after = (sum(x.size for x in jax.tree.leaves(v["params"])) for _, v in (old, new))
    with Progress("Computing the output of every layer"):
        changes, logits, changed = output_changes(old, new, images)
    print(f"{after:,} parameters instead of {before:,}.")
    headings = ("output", "relative change")
    print(table(headings, [(name, f"{change:.3g}") for name, change in changes.items()]))
    same = int((logits.argmax(-1) == changed.argmax(-1)).sum())
    print(f"The most probable class stays the same for {same} of {len(images)} images.")


if __name__ == "__main__":
    main()
