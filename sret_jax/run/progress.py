"""The progress of training: throughput, waiting for data, and the progress line."""

import contextlib
import time
from collections.abc import Iterator

import jax
import numpy as np

from sret_jax.terminal import LiveLine
from sret_jax.text import duration

MEANS = ("loss", "top1", "teacher_top1", "grad_norm", "loops", "gmacs")


class Window:
    """Collects the steps since the last report.

    Times are wall-clock seconds; time within `paused` (e.g. of an evaluation) does not count.

    Attributes:
      seconds: training time in all closed windows, and before this process.
    """

    def __init__(self, seconds_before: float) -> None:
        self.seconds = seconds_before
        self.restart()

    def restart(self) -> None:
        """Starts a new window now."""
        self._start = time.perf_counter()
        self._waited = 0.0
        self._paused = 0.0
        self._metrics: list[dict[str, jax.Array]] = []

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the enclosed time as waiting for data, unless the devices were busy throughout."""
        start = time.perf_counter()
        yield
        if not self._metrics or self._metrics[-1]["loss"].is_ready():  # type: ignore[attr-defined]
            self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the enclosed time."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def add(self, metrics: dict[str, jax.Array]) -> dict[str, jax.Array] | None:
        """Adds one step's metrics and waits for the step before, so at most one step runs ahead.

        Returns:
          The metrics of the step before, if it is in this window.
        """
        self._metrics.append(metrics)
        if len(self._metrics) < 2:
            return None
        return jax.block_until_ready(self._metrics[-2])

    def close(self, batch_size: int) -> dict[str, float]:
        """Ends the window: mean metrics, images/s and the fraction of time waited for data.

        The means are over the steps that updated the state; nan if there is none.
        """
        metrics = jax.device_get(self._metrics)
        elapsed = time.perf_counter() - self._start - self._paused
        updates = [m for m in metrics if m["bad_streak"] == 0]
        means = (*MEANS, *sorted(name for name in metrics[0] if name.startswith("top1_")))
        report = {name: _mean([m[name] for m in updates]) for name in means if name in metrics[0]}
        report["lr"] = float(metrics[-1]["lr"])
        report["bad_images"] = float(np.sum([m["bad_images"] for m in metrics]))
        report["skipped_steps"] = float(len(metrics) - len(updates))
        report["images_per_second"] = len(metrics) * batch_size / elapsed
        report["wait_share"] = self._waited / elapsed
        self.seconds += elapsed
        self.restart()
        return report


class ProgressLine:
    """A line that is rewritten in a terminal; elsewhere one plain line per report."""

    def __init__(self, total_steps: int, steps_per_epoch: float, *, enabled: bool):
        self._total = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._enabled = enabled
        self._line = LiveLine(enabled=enabled)

    def show(self, step: int, report: dict[str, float], seconds_left: float) -> None:
        """Shows the figures of the last window; in a terminal, as many as fit in its width."""
        fields = self._fields(step, report, seconds_left)
        if self._line.is_live:
            self._line.show(fields)
        elif self._enabled:
            print("  ".join(fields), flush=True)

    def say(self, message: str) -> None:
        """Prints a message that stays, above the progress line."""
        self._line.clear()
        if self._enabled:
            print(message, flush=True)

    def _fields(self, step: int, report: dict[str, float], seconds_left: float) -> list[str]:
        """The fields of the line, the most important first."""
        skipped = report["skipped_steps"]
        return [
            f"step {step:,}/{self._total:,}",
            *([f"{skipped:.0f} steps not finite, skipped"] if skipped else []),
            f"epoch {step / self._steps_per_epoch:.1f}",
            f"loss {report['loss']:.3f}",
            f"top-1 {100 * report['top1']:.1f}%",
            *([f"loops {report['loops']:.1f}"] if "loops" in report else []),
            f"{report['images_per_second']:,.0f} images/s",
            f"{duration(seconds_left)} left",
            f"waiting for data {100 * report['wait_share']:.0f}%",
            f"lr {report['lr']:.2e}",
        ]


def _mean(values: list[np.ndarray]) -> float:
    return float(np.mean(values)) if values else float("nan")
