"""A profiler trace of chosen steps."""

from typing import Any

import jax
from etils import epath


class Profiler:
    """Writes a trace of the steps first..last, counted from 1, to workdir/profile.

    Look at it with TensorBoard's profile plugin or at ui.perfetto.dev.
    """

    def __init__(self, steps: tuple[int, ...], workdir: epath.Path):
        self._first, self._last = steps or (0, 0)
        self._folder = workdir / "profile"

    def before(self, step: int) -> None:
        """Starts the trace if `step` is its first."""
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))

    def after(self, step: int, metrics: Any) -> None:
        """Ends the trace if `step`, which gave `metrics`, was its last."""
        if step == self._last:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
