"""Draws pictures as PNG files."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from etils import epath

from sret_jax.files import written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextlib.contextmanager
def picture(path: epath.Path, width: float, height: float, dpi: int = 110) -> "Iterator[Figure]":
    """Yields a figure to draw in, and then writes it as a PNG; if drawing raises, there is no file.

    Args:
      path: path of the PNG file.
      width: width in inches.
      height: height in inches.
      dpi: pixels per inch.

    Raises:
      UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # imported here, because it takes half a second

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    with written_whole(path, "wb") as file:
        figure.savefig(file, format="png", dpi=dpi)


def class_caption(name: str) -> str:
    """The name of a class as text in a picture; a bare number becomes "class 4"."""
    return f"class {name}" if name.isdigit() else name
