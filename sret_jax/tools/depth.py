"""Draws what each application of a block does in a run.

python -m sret_jax.tools.depth --workdir=RUN --picture=FILE.png --json=FILE.json
python -m sret_jax.tools.depth --workdir=RUN --loops=2,6 --attention=FILE.png photo.jpg other.png

The picture has, by application: the gradient at its output, for fresh weights and now; the learned
residual coefficients; by how much it changes the state, whether it does so in the direction of the
application before, and by less (a contraction); and on the evaluation split the accuracy and the
entropy of the head, read out after each application of the last block. Other numbers of loops than
in training are looked at as well. --attention draws where each application attends to in some
images, by default the first of the evaluation split.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from sret_jax.cli import Parser, clear_errors, path_argument, quiet_libraries
from sret_jax.data.views.images import EvalTransform
from sret_jax.errors import UserError
from sret_jax.evaluation.checkpoint_evaluation import open_weights
from sret_jax.evaluation.depth import Figures, first_images, measure_depth
from sret_jax.evaluation.predict import read_view
from sret_jax.files import write_json
from sret_jax.models.apply import normalise
from sret_jax.models.attention_maps import attention_maps
from sret_jax.picture import picture
from sret_jax.settings.saved_config import load_config
from sret_jax.text import table
from sret_jax.tools.anytime import parse_loops
from sret_jax.tools.attention_sheet import draw_attention_sheet

IMAGES = 4  # of the evaluation split, for attention maps
MOST_ROWS = 16  # of the table, per number of loops
PLAIN = "The model's residual sums are plain: there are no learned coefficients to draw."


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = Parser.of("depth", __doc__)
    parser.add_argument("--workdir", type=path_argument, required=True, help="workdir of a run")
    parser.add_argument("--picture", type=path_argument, help="default: depth.png in the workdir")
    parser.add_argument("--json", type=path_argument, help="default: depth.json in the workdir")
    parser.add_argument(
        "--loops", help="numbers of loops, e.g. 2,4; default: the trained number, and twice as many"
    )
    parser.add_argument("--attention", type=path_argument, help="draws attention maps to this PNG")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="images for --attention")
    args = parser.parse_args(argv)
    quiet_libraries()
    with clear_errors():
        if args.images and not args.attention:
            raise UserError(
                "images are drawn with --attention=FILE.png; give it, or leave them out"
            )
        loops = parse_loops(args.loops) if args.loops else []
        figures = measure_depth(args.workdir, loops)
        picture = args.picture or args.workdir / "depth.png"
        figures_file = args.json or args.workdir / "depth.json"
        write_json(figures_file, figures)
        draw(figures, picture)
        print(exits_table(figures))
        if args.attention:
            draw_attention(args.workdir, args.images, args.attention)
            print(f"Written: {args.attention}")
    print(f"Written: {figures_file} and {picture}")


def draw_attention(workdir: epath.Path, paths: Sequence[str], file: epath.Path) -> None:
    """Draws where each application attends to in some images.

    Args:
      workdir: workdir of a run.
      paths: image files; none: the first images of the evaluation split.
      file: path of the PNG.

    Raises:
      UserError: an image cannot be read, or the model's blocks do not attend.
    """
    config: Any = load_config(workdir)  # `measure_depth` has read it
    opened = open_weights(config, workdir)
    model = opened.model
    if not model.stages[0].heads:
        raise UserError(
            f"--attention: a {type(model).__name__} has no attention maps; leave it out"
        )
    view = EvalTransform(model.image_size, config.data.test_crop)
    images = (
        np.stack([read_view(view, path) for path in paths])
        if paths
        else first_images(opened, config, IMAGES)
    )
    variables = jax.device_get(opened.weights.get("eval_ema", opened.weights["eval"]))
    maps = attention_maps(model, variables, normalise(model, jnp.asarray(images)))
    draw_attention_sheet(model, images, maps, file)


def exits_table(figures: Figures) -> str:
    """Formats accuracy and entropy after each loop, for each number of loops."""
    rows = [
        (
            f"{number}{' (trained)' if int(number) == figures['loops'] else ''}",
            str(loop),
            f"{100 * top1:.2f}%",
            f"{entropy:.3f}",
        )
        for number, of in figures["exits"].items()
        for loop, (top1, entropy) in enumerate(zip(of["top1"], of["entropy"], strict=True), 1)
        if len(of["top1"]) <= MOST_ROWS or loop in (1, len(of["top1"]))
    ]
    return table(("loops", "read out after", "top-1", "entropy"), rows)


def draw(figures: Figures, path: epath.Path) -> None:
    """Draws the results of `measure_depth`."""
    with picture(path, 13, 8) as figure:
        gradients, skip, branch, changes, directions, exits = figure.subplots(2, 3).flat
        _draw_gradients(gradients, figures)
        _draw_coefficients({"skip": skip, "branch": branch}, figures)
        if figures["exits"]:
            _draw_dynamics(changes, directions, figures)
            _draw_exits(exits, figures)
        for axes in figure.axes:
            if not axes.has_data():
                axes.axis("off")
        if not figures["coefficients"]:
            skip.text(0, 0.5, PLAIN, fontsize="small", wrap=True)


def _draw_gradients(axes: Any, figures: Figures) -> None:
    steps = {"start": "before training", "end": f"after {figures['step']:,} steps"}
    for (name, label), colour in zip(steps.items(), ("tab:grey", "tab:blue"), strict=True):
        norms = figures["gradient_norm"][name]
        axes.plot(range(1, len(norms) + 1), norms, label=label, color=colour)
    axes.set_yscale("log")
    axes.set_title("Norm of the loss's gradient at the output")
    _mark_blocks(axes, figures, figures["loops"])


def _draw_coefficients(of_role: dict[str, Any], figures: Figures) -> None:
    for name, values in figures["coefficients"].items():
        kind, role = name.split(", ")
        given = [(a, v) for a, v in enumerate(values, 1) if v is not None]
        style = {"marker": ".", "markersize": 4, "linestyle": ""} if kind == "NLL" else {}
        of_role[role].plot(*zip(*given, strict=True), label=kind, **style)
    for role, axes in of_role.items() if figures["coefficients"] else ():
        axes.set_title(f"Learned coefficient of the {role}")
        _mark_blocks(axes, figures, figures["loops"])


def _draw_dynamics(changes: Any, directions: Any, figures: Figures) -> None:
    """The change of the state by application, for the largest number of loops."""
    number = max(map(int, figures["dynamics"]))
    found = figures["dynamics"][str(number)]
    for name, style in (("relative_change", "-"), ("contraction", ":")):
        values = [np.nan if value is None else value for value in found[name]]
        changes.plot(range(1, len(values) + 1), values, style, label=name.replace("_", " "))
    changes.axhline(1, color="0.6", linewidth=0.6)
    changes.set_yscale("log")
    changes.set_title(f"Change of the state ({number} loops)")
    values = [np.nan if value is None else value for value in found["cosine"]]
    directions.plot(range(1, len(values) + 1), values, ".-", label="cosine with the change before")
    directions.axhline(0, color="0.6", linewidth=0.6)
    directions.set_title(f"Direction of the change ({number} loops)")
    for axes in (changes, directions):
        _mark_blocks(axes, figures, number)


def _draw_exits(axes: Any, figures: Figures) -> None:
    """Accuracy (left) and entropy (right) after each application of the last block."""
    right = axes.twinx()
    for colour, (number, found) in enumerate(figures["exits"].items()):
        loops = range(1, len(found["top1"]) + 1)
        shares = [100 * share for share in found["top1"]]
        axes.plot(loops, shares, ".-", color=f"C{colour}", label=f"{number} loops")
        right.plot(loops, found["entropy"], ":", color=f"C{colour}")
    axes.axvline(figures["loops"], color="0.6", linewidth=0.6)
    axes.set_xlabel(f"applications of the last block (grey line: {figures['loops']}, trained)")
    axes.set_ylabel("top-1 (%)")
    right.set_ylabel("entropy (nats, dotted)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title("Read out after each application")
    axes.legend(frameon=False)


def _mark_blocks(axes: Any, figures: Figures, loops: int) -> None:
    for block in range(figures["blocks"]):
        axes.axvline(1 + block * loops, color="0.85", linewidth=0.6, zorder=0)
    axes.set_xlabel("application (grey lines: a new block begins)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)


if __name__ == "__main__":
    main()
