"""Pictures as PNG files."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from etils import epath

from sret_jax.files import written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextlib.contextmanager
def picture(path: epath.Path, width: float, height: float, dpi: int = 110) -> "Iterator[Figure]":
    """A figure to draw in, which becomes a PNG file once it is drawn; no file if drawing raises.

    Args:
      path: of the PNG file.
      width: in inches.
      height: in inches.
      dpi: pixels per inch.

    Raises:
      UserError: the storage does not take the file.
    """
    from matplotlib.figure import Figure  # imported only to draw, for it takes half a second

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    with written_whole(path, "wb") as file:
        figure.savefig(file, format="png", dpi=dpi)
