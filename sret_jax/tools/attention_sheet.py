"""Draws a sheet of images, and where each application of a model's blocks attends to in them."""

from collections.abc import Sequence

import numpy as np
from etils import epath

from sret_jax.models.model import Model
from sret_jax.picture import picture

MOST_MAPS = 16  # applications on a sheet; of deeper models they are spread evenly
CELL_INCHES = 1.3


def draw_attention_sheet(
    model: Model, images: np.ndarray, maps: Sequence[np.ndarray], path: epath.Path
) -> None:
    """Draws a row per image: the image, and its attention maps over it, application by application.

    Args:
      model: the model.
      images: as the model sees them, (B, S, S, 3) uint8.
      maps: from `attention_maps`.
      path: path of the PNG.

    Raises:
      UserError: the file cannot be written.
    """
    shown = np.unique(np.linspace(0, len(maps) - 1, MOST_MAPS).round().astype(int))
    width, height = ((n + 0.3) * CELL_INCHES for n in (len(shown) + 1, len(images)))
    side = images.shape[1]
    with picture(path, width, height + 0.4) as figure:
        rows = figure.subplots(len(images), len(shown) + 1, squeeze=False)
        for row, image, number in zip(rows, images, range(len(images)), strict=True):
            for axes in row:
                axes.axis("off")
                axes.imshow(image)
            for axes, application in zip(row[1:], shown, strict=True):
                attention = maps[application][number]
                extent = (-0.5, side - 0.5, side - 0.5, -0.5)
                axes.imshow(attention, extent=extent, cmap="viridis", alpha=0.75)
                if number == 0:
                    axes.set_title(place(model, int(application)), fontsize=7)
        rows[0][0].set_title("image", fontsize=7)
        whose = "of the class token" if model.stages[0].prefix else "that each token receives"
        colours = "dark: its least, bright: its most in a picture"
        figure.suptitle(f"Attention {whose}, mean over heads ({colours})", fontsize=9)


def place(model: Model, application: int) -> str:
    """Names an application, counted over the whole model from 0: "stage 1, block 2, loop 1"."""
    block, loop = divmod(application, model.loops)
    for stage, blocks in enumerate(model.blocks):
        if block < blocks:
            return f"stage {stage + 1}\nblock {block + 1}, loop {loop + 1}"
        block -= blocks
    raise IndexError(f"the model has no application {application}")
