"""Makes an untied model of a recursive one, with equal logits: one layer for each application.

python -m sret_jax.tools.unroll RUN OUT.safetensors

LoRA and the adapters norms and biases become part of the layers' weights, so whatever reads the
untied family's weights reads OUT: timm, for DeiT, PiT, Swin and Mixer.
"""

from sret_jax.cli import Parser, clear_errors, path_argument, quiet_libraries, weights_argument
from sret_jax.errors import UserError
from sret_jax.evaluation.output_changes import outputs, photographs, relative_change
from sret_jax.evaluation.predict import views
from sret_jax.models.registry import title
from sret_jax.models.tying import untied
from sret_jax.terminal import Progress
from sret_jax.weights.description import Description
from sret_jax.weights.loading import find
from sret_jax.weights.writing import check_free, write_weights


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = Parser.of("unroll", __doc__)
    parser.add_argument("source", metavar="IN", type=weights_argument, help="a recursive model")
    parser.add_argument(
        "target", metavar="OUT", type=path_argument, help="a new folder or weight file"
    )
    parser.add_argument("--ema", action="store_true", help="use the moving average of the weights")
    args = parser.parse_args(argv)
    quiet_libraries()
    with clear_errors():
        check_free(args.target)
        stored = find(args.source, ema=args.ema)
        model, variables = stored.load()
        try:
            plain, weights = untied(model, variables)
        except ValueError as e:
            raise UserError(f"{args.source}: {e}") from e
        variant = stored.variant(model)
        description = Description.of(plain, variant, stored.class_names, stored.test_crop)
        images = views(photographs(), model.image_size, stored.test_crop)
        with Progress("Comparing logits"):
            before, after = (outputs(*m, images)[1] for m in ((model, variables), (plain, weights)))
        write_weights(args.target, plain, weights, description, stored.origin)
    print(f"Logits of {len(images)} photographs differ by {relative_change(before, after):.1g}.")
    print(f"Written: {args.target} ({title(plain, variant)})")


if __name__ == "__main__":
    main()
