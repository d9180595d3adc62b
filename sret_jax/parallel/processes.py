"""Child processes that leave nothing behind when they or their parents are killed."""

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
    """Ends this process when its parent ends. Does nothing except on Linux.

    Args:
      parent: process id of the parent, which may have ended already.
      patience: seconds to finish current work; 0: the kernel kills this process at once.
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
    """On Linux, makes this process the parent of descendants whose own parent has ended.

    So it can observe that they end, even in a container whose process 1 does not wait for them.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


@functools.cache
def shield_spawned(prefix: str) -> None:
    """Keeps the main script and signals out of spawned processes whose name begins with `prefix`.

    Python imports the main script into every spawned process. If that script calls `fit` without
    `if __name__ == "__main__"`, the process would train again. What such a process receives must
    be pickled by value, as cloudpickle does for objects that the script defines.

    SIGTERM and Ctrl-C may be sent to the whole process group, and would end a process that is still
    starting. So it inherits a mask that blocks them from the thread that starts it, if that is not
    the main thread.
    """
    prepare = multiprocessing.spawn.get_preparation_data

    def prepare_shielded(name: str) -> dict[str, Any]:
        data = prepare(name)
        if name.startswith(prefix):
            for script in ("init_main_from_name", "init_main_from_path"):
                data.pop(script, None)
            if threading.current_thread() is not threading.main_thread():
                signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        return data

    multiprocessing.spawn.get_preparation_data = prepare_shielded


def end_group(group: int, patience: float) -> None:
    """Waits until a process group is empty; after `patience` seconds it kills what is left.

    A killed Python process leaves its resource tracker in the group, which needs a moment to
    remove the shared memory.

    Args:
      group: the process group; its leader must have been waited for.
      patience: seconds to wait.
    """
    deadline = time.monotonic() + patience
    while _runs(group):
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _runs(group: int) -> bool:
    """Whether the group has processes that have not ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
