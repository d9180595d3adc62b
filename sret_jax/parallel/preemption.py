"""Being asked to stop, by SIGTERM, as schedulers and machines about to be taken away do it."""

import contextlib
import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(Exception):
    """The run was asked to stop, and what it has done so far is safe; the message says so."""


class Preemption(contextlib.AbstractContextManager):
    """Tells every process, at the same point of their work, that one of them was asked to stop.

    Where `jax.distributed` runs, JAX's own notifier takes SIGTERM, and a Python handler would
    silence it. Elsewhere a handler takes SIGTERM and the first Ctrl-C until the context ends; a
    second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self._polls = 0
        self._asked = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        # Python allows handlers in the main thread only.
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
        """To be called by every process after every batch, of training and evaluation alike.

        Raises:
          Preempted: some process was asked to stop, and all are at this call.
        """
        self._polls += 1  # JAX agrees on one of these numbers
        if self._asked or multihost_utils.reached_preemption_sync_point(self._polls):
            raise Preempted("Stopped as asked.")

    def _ask(self, number: int, frame: Any) -> None:
        del frame
        self._asked = True
        signal.signal(signal.SIGINT, self._handlers[signal.SIGINT])
        # print may be in the middle of a line of its own.
        os.write(1, f"\n{signal.Signals(number).name}: stopping after this batch.\n".encode())
