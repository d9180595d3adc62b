"""Processes that leave nothing behind when they, or the one that started them, are killed."""

import contextlib
import ctypes
import functools
import multiprocessing.spawn
import os
import signal
import sys
import threading
import time
from typing import Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
POLL_SECONDS = 0.05


def die_with_parent(parent: int, patience: float = 0.0) -> None:
    """Ends this process when its parent is gone; on Linux, else does nothing.

    Args:
      parent: its process id; it may be gone already.
      patience: seconds to finish what it has begun; 0: the kernel kills it.
    """
    if sys.platform == "linux":
        number = signal.SIGUSR2 if patience else signal.SIGKILL
        if patience:
            end = functools.partial(os._exit, 128 + number)
            signal.signal(number, lambda *_: threading.Timer(patience, end).start())
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)


def adopt_orphans() -> None:
    """Makes this process the parent of its descendants whose own parent has ended; on Linux.

    It can then see that they ended too, also where process 1 of a container never asks.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


@functools.cache
def start_without_script(prefix: str) -> None:
    """Keeps the main script out of spawned processes whose name begins so.

    Python imports it into each of them, where a script that calls `fit` without
    `if __name__ == "__main__"` would train again. What such a process is given must be pickled by
    value, as cloudpickle does with what the script defines.
    """
    prepare = multiprocessing.spawn.get_preparation_data

    def prepare_without_script(name: str) -> dict[str, Any]:
        data = prepare(name)
        if name.startswith(prefix):
            for script in ("init_main_from_name", "init_main_from_path"):
                data.pop(script, None)
        return data

    multiprocessing.spawn.get_preparation_data = prepare_without_script


def end_group(group: int, patience: float) -> None:
    """Waits until no process of a group is left, and kills those left after `patience` seconds.

    The resource tracker of a killed Python process is one of them: it removes the shared memory,
    for which a moment is enough.

    Args:
      group: process group, the leader of which has been waited for.
      patience: seconds.
    """
    deadline = time.monotonic() + patience
    while _runs(group):
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _runs(group: int) -> bool:
    """Whether the group has processes, those apart that ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
