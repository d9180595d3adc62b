"""Draws the loss of trained runs around their weights, in a plane of two random directions.

python -m sret_jax.tools.landscape RUN... --picture=FILE.png --json=FILE.json
python -m sret_jax.tools.landscape --redraw=FILE.json --picture=FILE.png

RUN is a workdir, or one of its steps such as RUN/checkpoints/best. All runs are drawn at one scale.
Filters of the directions are as long as those of the weights (Li et al., "Visualizing the Loss
Landscape of Neural Nets", 2018). The loss is that of training images without augmentation, label
smoothing or weight decay, in evaluation mode; BatchNorm's statistics stay those of the run.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import textwrap
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sret_jax.cli import Parser, clear_errors, path_argument, quiet_libraries
from sret_jax.data.loader import Loader
from sret_jax.data.order import Samples, padded_sample
from sret_jax.data.sources.source import Source
from sret_jax.data.sources.splits import digest
from sret_jax.data.views.images import EvalTransform
from sret_jax.errors import UserError
from sret_jax.evaluation.bad_images import BadImages
from sret_jax.evaluation.labelled import open_labelled
from sret_jax.evaluation.loss_surface import grid, losses_in_plane, principal_curvatures
from sret_jax.files import write_json
from sret_jax.models.model import Model
from sret_jax.parallel.mesh import batch_sharding, make_mesh
from sret_jax.picture import picture
from sret_jax.settings.saved_config import CONFIG_FILE, is_converted
from sret_jax.terminal import Progress
from sret_jax.text import table
from sret_jax.weights.loading import StoredFolder, split_step

IMAGES_AT_ONCE = 128  # on each device
CURVATURE_STEP = 0.02  # small beside the valley, and large beside rounding in float32
LEVELS = 25  # limits of colours between the lowest and the highest loss, in geometric steps
LOWEST = 1e-4  # nats; losses below it have the lowest colour
COLUMNS = 3  # most panels in a row of the picture
CHARACTERS = 14  # of the caption per inch

Surface = dict[str, Any]  # see `measure`
KEYS = {"run", "step", "seed", "images", "digest", "loss", "curvatures", "curvature_step"}


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = Parser.of("landscape", __doc__)
    parser.add_argument("runs", metavar="RUN", type=path_argument, nargs="*", help="a run or step")
    parser.add_argument("--images", type=int, default=1000, help="training images; default: 1000")
    parser.add_argument(
        "--points", type=int, default=21, help="losses along each direction, odd; default: 21"
    )
    parser.add_argument("--seed", type=int, default=0, help="of images and directions; default: 0")
    parser.add_argument("--ema", action="store_true", help="use the moving average of the weights")
    parser.add_argument(
        "--picture", type=path_argument, help="default: landscape.png in the first workdir"
    )
    parser.add_argument(
        "--json", type=path_argument, help="default: landscape.json in the first workdir"
    )
    parser.add_argument(
        "--redraw",
        metavar="FILE.json",
        type=path_argument,
        help="draws what this command has written to a --json, and computes nothing",
    )
    args = parser.parse_args(argv)
    quiet_libraries()
    with clear_errors():
        if bool(args.redraw) == bool(args.runs):
            raise UserError("give one RUN or more, or else --redraw=FILE.json")
        if args.redraw:
            surfaces, place, written = read_surfaces(args.redraw), args.redraw.parent, []
        else:
            check_numbers(args.images, args.points, args.seed)
            opened = [open_run(run, ema=args.ema) for run in args.runs]
            surfaces = [measure(run, args.images, args.points, args.seed) for run in opened]
            place = opened[0].stored.workdir
            written = [args.json or place / "landscape.json"]
            write_json(written[0], surfaces)
        print(surface_table(surfaces))
        say_other_images(surfaces)
        written.append(args.picture or place / "landscape.png")
        draw(surfaces, written[-1])
    print(f"Written: {' and '.join(map(str, written))}")


def check_numbers(images: int, points: int, seed: int) -> None:
    """Raises UserError if a number on the command line is out of range."""
    if images < 1:
        raise UserError(f"--images={images} must be at least 1")
    if points < 3 or points % 2 == 0:
        raise UserError(
            f"--points={points} must be odd and at least 3, so that the weights of the run are in "
            "the middle"
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed={seed} must be in 0 .. {2**32 - 1}")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run whose landscape is drawn.

    Attributes:
      name: how the user calls it.
      config: its config.
      stored: its weights.
      model: its model, for all devices.
      source: its training images.
    """

    name: str
    config: ConfigDict
    stored: StoredFolder
    model: Model
    source: Source


def open_run(run: epath.Path, *, ema: bool) -> Run:
    """Opens a workdir or one of its steps.

    Raises:
      UserError: there is no run, or its training images are not there.
    """
    workdir, step = split_step(run)
    stored = StoredFolder(workdir, step, ema=ema)
    config = stored.config
    if config is None or is_converted(config):
        raise UserError(f"{workdir} holds no {CONFIG_FILE} of a run; give the workdir of one")
    if config.data.synthetic:
        raise UserError(
            f"{workdir} was trained on noise (config.data.synthetic=True), which has no landscape "
            "to speak of; give a run on images"
        )
    model = stored.model().clone(mesh=make_mesh())
    config.data.eval_split = config.data.train_split
    source, remark = open_labelled(config, workdir, model.num_classes)
    if remark:
        print(remark, flush=True)
    here = pathlib.Path.cwd()
    name = str(workdir.relative_to(here) if workdir.is_relative_to(here) else workdir)
    return Run(name, config, stored, model, source)


def measure(run: Run, images: int, points: int, seed: int) -> Surface:
    """Computes the loss around the weights of a run.

    Args:
      run: from `open_run`.
      images: number of training images, which the seed draws; all if there are fewer.
      points: number of losses along each direction, from -1 to 1.
      seed: seed of the images and of the directions.

    Returns:
      {"run": its name, "step", "ema", "seed", "images", "digest": that of the names of all training
       images, "coordinates": (G,), "losses": (G, G), a row for each coordinate along the second
       direction, None if not finite, "loss": that of the weights, "curvatures" and
       "curvature_step": see `principal_curvatures`}.

    Raises:
      UserError: the weights or too many of the images cannot be read.
    """
    mesh, size = run.model.mesh, run.model.image_size
    assert mesh is not None
    variables = run.stored.read(run.model, mesh)
    images = min(images, len(run.source))
    at_once = math.ceil(min(images, IMAGES_AT_ONCE * mesh.size) / mesh.size) * mesh.size
    view = EvalTransform(size, run.config.data.test_crop)
    chosen = padded_sample(run.source, images, at_once, seed)
    samples = Samples(chosen, view, size, seed=0, replace=False)
    loader = Loader(samples, at_once, batch_sharding(mesh), start_step=0, workers=0, prefetch=2)
    half = points // 2
    coordinates = np.arange(-half, half + 1) / half
    nearest = np.arange(-1, 2) * CURVATURE_STEP
    positions = np.concatenate([grid(coordinates), grid(nearest)])
    total = images * len(positions)
    with contextlib.closing(loader), Progress(run.name, total, "losses") as progress:
        losses = losses_in_plane(
            run.model,
            variables,
            islice(loader, math.ceil(images / at_once)),
            positions,
            seed=seed,
            computed=progress.add,
        )
    BadImages(run.source, run.config.data.max_bad_fraction, print).check(loader)
    surface = losses[: points**2].reshape(points, points)
    listed = [[loss if math.isfinite(loss) else None for loss in row] for row in surface.tolist()]
    return {
        "run": run.name,
        "step": run.stored.step,
        "ema": run.stored.ema,
        "seed": seed,
        "images": images,
        "digest": digest(run.source),
        "coordinates": coordinates.tolist(),
        "losses": listed,
        "loss": listed[half][half],
        "curvature_step": CURVATURE_STEP,
        "curvatures": principal_curvatures(losses[points**2 :].reshape(3, 3), CURVATURE_STEP),
    }


def read_surfaces(path: epath.Path) -> list[Surface]:
    """Reads what this command has written to a --json.

    Raises:
      UserError: the file is missing, or contains something else.
    """
    try:
        surfaces: list[Surface] = json.loads(path.read_text(encoding="utf-8"))
        for surface in surfaces:
            square = (len(surface["coordinates"]),) * 2
            if _losses(surface).shape != square or not surface.keys() >= KEYS:
                raise ValueError("a surface is not whole")
            _title(surface)  # raises where a value is of another kind
        if not surfaces:
            raise ValueError("no surface")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise UserError(
            f"{path} cannot be drawn ({e}); give a file that landscape --json has written"
        ) from e
    return surfaces


def surface_table(surfaces: Sequence[Surface]) -> str:
    """Formats the loss of the weights and the curvatures of each surface."""
    rows = [
        (surface["run"], f"{surface['step']:,}", _number(surface["loss"]), _curvatures(surface))
        for surface in surfaces
    ]
    return table(("run", "step", "loss", "principal curvatures"), rows)


def say_other_images(surfaces: Sequence[Surface]) -> None:
    """Prints a sentence if the losses are not of the same images."""
    first = surfaces[0]
    for other in surfaces[1:]:
        if any(other[key] != first[key] for key in ("digest", "images", "seed")):
            print(
                f"{first['run']} and {other['run']} have other training images, so that their "
                "losses are not of the same images."
            )


def draw(surfaces: Sequence[Surface], path: epath.Path) -> None:
    """Draws surfaces side by side, with the same levels and colours.

    Raises:
      UserError: no loss is finite, or the file cannot be written.
    """
    from matplotlib.colors import LogNorm

    losses = [_losses(surface) for surface in surfaces]
    finite = np.concatenate([x[np.isfinite(x)] for x in losses])
    if not finite.size:
        raise UserError("no loss is finite, neither at the weights nor around them")
    low = max(finite.min(), LOWEST)
    levels = np.geomspace(low, max(finite.max(), 1.01 * low), LEVELS)
    rows = math.ceil(len(surfaces) / COLUMNS)
    columns = math.ceil(len(surfaces) / rows)
    width = 3.9 * columns + 1
    with picture(path, width, 4.1 * rows + 0.8) as figure:
        panels = [*figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat]
        for axes in panels[len(surfaces) :]:
            axes.set_visible(False)
        for axes, surface, z in zip(panels, surfaces, losses, strict=False):
            at = surface["coordinates"]
            colours = axes.contourf(
                at, at, z, levels, norm=LogNorm(levels[0], levels[-1]), extend="both"
            )
            axes.contour(at, at, z, levels, colors="white", linewidths=0.4)
            axes.plot(0, 0, "+", color="white")
            axes.set_title(_title(surface), fontsize="medium")
            axes.set_aspect("equal")
        figure.colorbar(colours, ax=panels, label="loss (nats)", format="%.3g", shrink=0.9)
        lines = textwrap.wrap(_caption(surfaces), int(CHARACTERS * width))
        figure.supxlabel("\n".join(lines), fontsize="small")


def _caption(surfaces: Sequence[Surface]) -> str:
    first = surfaces[0]
    return (
        f"Mean loss of {first['images']:,} training images without augmentation, on one scale. "
        "At +: the weights of the run. Axes: steps along two random directions, whose filters are "
        "as long as those of the weights (Li et al., 2018). Curvatures: the principal ones at the "
        f"weights, by central differences over steps of {first['curvature_step']}."
    )


def _title(surface: Surface) -> str:
    average = " (EMA)" if surface["ema"] else ""
    return (
        f"{surface['run']}{average}, step {surface['step']:,}\n"
        f"loss {_number(surface['loss'])}, curvatures {_curvatures(surface)}"
    )


def _curvatures(surface: Surface) -> str:
    values = surface["curvatures"]
    return "not finite" if values is None else " and ".join(f"{value:.3g}" for value in values)


def _number(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def _losses(surface: Surface) -> np.ndarray:
    return np.array(surface["losses"], float)  # None -> nan


if __name__ == "__main__":
    main()
