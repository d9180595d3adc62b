"""Detects a run that no longer steps: prints what every thread is doing, then ends the process."""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator

from sret_jax import exit_status
from sret_jax.text import duration

REMEMBERED = 100  # the median is over the last so many steps
CHECKS = 20  # checks within the shortest time that counts as a hang


class Watchdog(contextlib.AbstractContextManager):
    """Watches the time since the last `beat`.

    After max(least_seconds, factor * median step time) without a beat it prints the stacks of all
    threads, once per hang. After `stop_seconds` it ends the process with status 76. Before the end
    of the first step, and within `during`, only `stop_seconds` applies.
    """

    def __init__(self, factor: float, least_seconds: float, stop_seconds: float):
        self._factor = factor
        self._least, self._stop = least_seconds, stop_seconds
        self._steps: deque[float] = deque(maxlen=REMEMBERED)
        self._lock = threading.Lock()  # guards the attributes below, which both threads change
        self._last = time.monotonic()
        self._dumped = False
        self._doing = ""
        self._told = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watchdog":
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def beat(self, *, step: bool = False) -> None:
        """Reports that the run is alive; with `step`, that a training step has ended."""
        with self._lock:
            now = time.monotonic()
            if step:
                self._steps.append(now - self._last)
            self._last, self._dumped, self._told = now, False, 0.0

    @contextlib.contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """Says every `least_seconds` that the enclosed code is still `doing`; it is one beat."""
        self.beat()
        self._doing = doing
        try:
            yield
        finally:
            self.beat()
            self._doing = ""

    @property
    def patience(self) -> float:
        """The seconds without a beat after which the stacks are printed."""
        steps = list(self._steps)
        if self._doing or not steps:
            return self._stop
        return min(self._stop, max(self._least, self._factor * statistics.median(steps)))

    def _watch(self) -> None:
        interval = min(self._least, self._stop) / CHECKS
        checked = time.monotonic()
        while not self._ended.wait(interval):
            with self._lock:
                now = time.monotonic()
                # A process that was suspended, for example by Ctrl-Z, has not hung.
                self._last += max(0.0, now - checked - 10 * interval)
                checked = now
                silent, doing = now - self._last, self._doing
                hangs = not self._dumped and silent > self.patience
                self._dumped |= hangs
                tell = bool(doing) and silent > self._told + self._least
                self._told = silent if tell else self._told
            if hangs:
                _say(
                    f"{_state(doing, silent)}; after {duration(self._stop)} this process will end "
                    f"with status {exit_status.HUNG}. What its threads are doing:"
                )
                with contextlib.suppress(Exception):  # notebooks have no such stream
                    faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
            elif tell:
                _say(f"{_state(doing, silent)}.")
            if silent > self._stop:
                advice = "raise config.watchdog.stop_seconds if it takes so long; " if doing else ""
                _say(
                    f"{_state(doing, silent)}: ending with status {exit_status.HUNG}; {advice}"
                    "start again to resume from the newest checkpoint."
                )
                _wake_workers()
                os._exit(exit_status.HUNG)  # the main thread is stuck and cannot


def _state(doing: str, silent: float) -> str:
    return f"Still {doing} after {duration(silent)}" if doing else f"No step for {duration(silent)}"


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _wake_workers() -> None:
    """Wakes the loader's workers if they were stopped, so that they see their parent end."""
    for worker in multiprocessing.active_children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid or 0, signal.SIGCONT)
