"""Lists the published models, with their cost and accuracy.

python -m sret_jax.tools.models
python -m sret_jax.tools.models 'sret_*'
"""

from collections.abc import Sequence

import jax

from sret_jax.cli import Parser, clear_errors, quiet_libraries
from sret_jax.errors import UserError
from sret_jax.models.flops import model_macs
from sret_jax.models.registry import create_model, family_of, list_models, variant
from sret_jax.models.variables import abstract_variables
from sret_jax.terminal import Progress
from sret_jax.text import markdown_table, table

HEADINGS = ("model", "family", "parameters", "GMACs", "image size", "published top-1")


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = Parser.of("models", __doc__)
    parser.add_argument(
        "pattern", metavar="PATTERN", nargs="?", default="*", help="e.g. 'sret_*'; default: all"
    )
    parser.add_argument("--markdown", action="store_true", help="prints the table as Markdown")
    args = parser.parse_args(argv)
    quiet_libraries()
    with clear_errors():
        names = list_models(args.pattern)
        if not names:
            raise UserError(
                f"no model is called {args.pattern}; there are {', '.join(list_models())}"
            )
        print(model_table(names, markdown=args.markdown))


def model_table(names: Sequence[str], *, markdown: bool = False) -> str:
    """The table of these models; each takes a second to trace."""
    published = [(name, size) for name in names for size in (None, *variant(name).other_sizes)]
    with Progress("Counting", len(published), "models") as progress:
        rows = [row(name, size) for name, size in progress.counted(published)]
    return (markdown_table if markdown else table)(HEADINGS, rows)


def row(name: str, image_size: int | None = None) -> tuple[str, ...]:
    """A model's name, family, parameters, GMACs of one image, image size, and ImageNet top-1."""
    published = variant(name, image_size)
    sizes = {} if image_size is None else {"image_size": image_size, **published.settings}
    model, top1 = create_model(name, **sizes), published.top1
    parameters = sum(p.size for p in jax.tree.leaves(abstract_variables(model)["params"]))
    return (
        name,
        family_of(name).__name__,
        f"{parameters / 1e6:.1f}M",
        f"{model_macs(model) / 1e9:.2f}",
        str(model.image_size),
        "" if top1 is None else f"{top1:.1f}%",
    )


if __name__ == "__main__":
    main()
