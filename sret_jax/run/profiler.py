"""A profiler trace of chosen steps."""

from typing import Any

import jax
from etils import epath


class Profiler:
    """Writes a trace of the steps first..last, counted from 1, to workdir/profile.

    TensorBoard's profile plugin and ui.perfetto.dev display it.
    """

    def __init__(self, steps: tuple[int, ...], workdir: epath.Path):
        self._first, self._last = steps or (0, 0)
        self._folder = workdir / "profile"
        self._running = False

    def before(self, step: int) -> None:
        """Starts the trace if `step` is the first step of it."""
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, metrics: Any) -> None:
        """Ends the trace if `step`, which returned `metrics`, is the last step of it."""
        if step == self._last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Ends the trace if the run ended before its last step."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
