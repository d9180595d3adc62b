"""Draws a sheet of pictures beside the classes that a model predicts for them."""

from collections.abc import Sequence
from typing import Any

from etils import epath

from sret_jax.data.views.images import EvalTransform, decode
from sret_jax.picture import class_caption, picture
from sret_jax.tools.trained import Trained

MOST_PICTURES = 24
COLUMNS = 3
CELL_INCHES = (4.2, 1.9)
LONGEST_NAME = 28  # characters


def draw_sheet(trained: Trained, rows: Sequence[dict[str, Any]], path: epath.Path) -> None:
    """Draws each image as the model sees it, and its likeliest classes as bars.

    Args:
      trained: the model.
      rows: for each image {"path", "image": its name, "top": [{"class", "probability"}, ...]}.
      path: path of the PNG.

    Raises:
      UserError: the file cannot be written.
    """
    columns = max(1, min(COLUMNS, len(rows)))
    lines = max(1, -(-len(rows) // columns))
    with picture(path, columns * CELL_INCHES[0], lines * CELL_INCHES[1]) as figure:
        axes = figure.subplots(
            lines, 2 * columns, squeeze=False, width_ratios=[1, 1.2] * columns
        ).reshape(-1, 2)
        for pair in axes[len(rows) :]:
            for empty in pair:
                empty.axis("off")
        view = EvalTransform(trained.model.image_size, trained.test_crop)
        for (image, bars), row in zip(axes, rows, strict=False):
            draw_image(image, epath.Path(row["path"]).read_bytes(), view)
            name = _short(epath.Path(row["image"]).name)
            image.set_title(name, fontsize=8, parse_math=False)
            image.axis("off")
            _draw_bars(bars, row["top"])


def draw_image(axes: Any, data: bytes, view: EvalTransform) -> None:
    """Draws the part of an image that evaluation sees, as the model sees it.

    An image that evaluation enlarges is blurred by that; here its own pixels are drawn, as squares.
    """
    image = decode(data)
    if min(image.size) >= view.shorter_side:
        axes.imshow(view(data))
        return
    axes.imshow(image, interpolation="nearest")
    half = min(image.size) * view.size / view.shorter_side / 2
    x, y = ((side - 1) / 2 for side in image.size)  # the centres of the corner pixels are 0, side-1
    axes.set(xlim=(x - half, x + half), ylim=(y + half, y - half))


def _draw_bars(axes: Any, top: list[dict[str, Any]]) -> None:
    colours = ["lightskyblue"] + ["0.88"] * (len(top) - 1)
    axes.barh(range(len(top)), [one["probability"] for one in top], color=colours, height=0.8)
    for rank, one in enumerate(top):
        name = class_caption(_short(one["class"]))
        axes.text(0.02, rank, name, va="center", fontsize=8, parse_math=False)
        axes.text(0.98, rank, f"{one['probability']:.1%}", va="center", ha="right", fontsize=8)
    axes.set(xlim=(0, 1), ylim=(4.6, -0.6))
    axes.axis("off")


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
