"""Stops a run on SIGTERM, which schedulers send before they take a machine away."""

import contextlib
import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(Exception):
    """The run was asked to stop. Its work so far is safe; the message says so."""


class Preemption(contextlib.AbstractContextManager):
    """Stops all processes at the same batch if one of them was asked to stop.

    If `jax.distributed` runs, JAX's own notifier takes SIGTERM; a Python handler would disable it.
    Otherwise a handler takes SIGTERM and the first Ctrl-C until the context ends. A second Ctrl-C
    ends the process at once.
    """

    def __init__(self) -> None:
        self._polls = 0
        self._asked = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        # Python allows signal handlers in the main thread only.
        main = threading.current_thread() is threading.main_thread()
        if main and not jax.distributed.is_initialized():
            self._handlers = {number: signal.getsignal(number) for number in SIGNALS}
            for number in SIGNALS:
                signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def check(self) -> None:
        """Every process must call this after every batch, in training and in evaluation.

        Raises:
          Preempted: some process was asked to stop; all processes raise at the same call.
        """
        self._polls += 1  # the processes agree on one of these numbers
        if self._asked or multihost_utils.reached_preemption_sync_point(self._polls):
            raise Preempted("Stopped as asked.")

    def _ask(self, number: int, frame: Any) -> None:
        del frame
        self._asked = True
        signal.signal(signal.SIGINT, self._handlers[signal.SIGINT])
        # Not print: the handler may interrupt a print in the middle of a line.
        with contextlib.suppress(OSError):  # Ctrl-C may have ended the reader of a pipe
            os.write(1, f"\n{signal.Signals(number).name}: stopping after this batch.\n".encode())
