"""How much memory this machine has, and how much this process and its workers hold."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

MEGABYTE = 1 << 20
CGROUP_LIMIT = pathlib.Path("/sys/fs/cgroup/memory.max")  # as a container sees its own


def machine_memory(limit: pathlib.Path = CGROUP_LIMIT) -> int:
    """Bytes of the machine, or as many as its container may use.

    Args:
      limit: the file that says how many; it may hold "max" or not be there.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):
        return min(machine, int(limit.read_text()))
    return machine


def resident_megabytes() -> float:
    """Memory of this process and its children; a shared page is split among its users."""
    return sum(map(_proportional_bytes, _process_tree())) / MEGABYTE


def _process_tree() -> Iterator[int]:
    """This process and its children."""
    yield os.getpid()
    for children in pathlib.Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        yield from map(int, children.read_text().split())


def _proportional_bytes(process: int) -> int:
    rollup = pathlib.Path(f"/proc/{process}/smaps_rollup")
    with contextlib.suppress(OSError):  # a worker may just have ended
        for line in rollup.read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
