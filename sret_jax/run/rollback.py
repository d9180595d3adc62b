"""Goes back to the last good checkpoint, and skips the steps that diverged.

rollbacks.json lists the windows [first, last] of steps that are never repeated: training jumps from
step first - 1 straight to step last + 1 with its weights unchanged, and never uses the batches in
between. So the batch remains a function of the step, and a run killed at any point ends the same.
"""

import dataclasses
import json

from etils import epath

from sret_jax.errors import UserError
from sret_jax.files import write_json

ROLLBACKS_FILE = "rollbacks.json"
Window = tuple[int, int]


class Diverged(UserError):
    """Losses or gradients were not finite for too many steps.

    Attributes:
      step: the last of those steps.
      last_good: the last step before them.
    """

    def __init__(self, message: str, step: int, last_good: int):
        super().__init__(message)
        self.step, self.last_good = step, last_good


@dataclasses.dataclass(frozen=True)
class Rollbacks:
    """The windows of steps that a run has skipped, in the order of its rollbacks."""

    windows: tuple[Window, ...] = ()

    @classmethod
    def read(cls, workdir: epath.Path) -> "Rollbacks":
        """Reads the windows from a workdir; none if it has no rollbacks.json.

        Raises:
          UserError: the file was edited by hand and cannot be read.
        """
        path = workdir / ROLLBACKS_FILE
        if not path.exists():
            return cls()
        try:
            windows = json.loads(path.read_text())["windows"]
            return cls(tuple((int(first), int(last)) for first, last in windows))
        except (ValueError, TypeError, KeyError) as e:
            raise UserError(
                f'{path} does not read {{"windows": [[first, last], ...]}} ({e}); fix it'
            ) from e

    def write(self, workdir: epath.Path) -> None:
        """Writes rollbacks.json atomically."""
        write_json(workdir / ROLLBACKS_FILE, {"windows": self.windows, "count": len(self.windows)})

    def with_window(self, first: int, last: int) -> "Rollbacks":
        """Returns a copy with one more window."""
        return Rollbacks((*self.windows, (first, last)))

    def continues_at(self, step: int) -> int:
        """The step as which a state of `step` continues: the end of a window that begins there."""
        for first, last in self.windows:
            if first <= step + 1 <= last:
                step = last
        return step

    def __str__(self) -> str:
        return ", ".join(f"steps {first:,} to {last:,}" for first, last in self.windows)
