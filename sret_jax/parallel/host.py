"""What the host, or the container on it, grants this process: cores, memory, shared memory."""

import contextlib
import functools
import math
import os
import pathlib
import socket
import sys
import zlib
from collections.abc import Iterator

import jax
import numpy as np

from sret_jax.parallel.distributed import gather

ROOT = pathlib.Path("/")
CGROUPS = "sys/fs/cgroup"
SHARED_MEMORY = "dev/shm"
CGROUP_LIMIT = pathlib.Path("/sys/fs/cgroup/memory.max")  # as a container sees its own


def available_cores(root: pathlib.Path = ROOT) -> int:
    """Cores this process may use: those of its affinity, or fewer by its cgroup's quota.

    Args:
      root: of the file system in which the quota is looked up.
    """
    if sys.platform != "linux":
        return os.cpu_count() or 1
    return min([len(os.sched_getaffinity(0)), *map(math.ceil, _quotas(root))])


def machine_memory(limit: pathlib.Path = CGROUP_LIMIT) -> int:
    """Bytes of the machine, or as many as its container may use.

    Args:
      limit: the file that says how many; it may hold "max" or not be there.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):
        return min(machine, int(limit.read_text()))
    return machine


def shared_memory_left(root: pathlib.Path = ROOT) -> int | None:
    """Bytes of shared memory that are free; None where no file system bounds them.

    Args:
      root: of the file system in which it is looked up.
    """
    if sys.platform != "linux":
        return None
    try:
        left = os.statvfs(root / SHARED_MEMORY)
    except OSError:
        return 0
    return left.f_bavail * left.f_frsize


@functools.cache
def sharers_of_memory() -> int:
    """How many processes of this run share this one's shared memory; at first also a barrier."""
    if jax.process_count() == 1:
        return 1
    try:
        mount = (ROOT / SHARED_MEMORY).stat().st_dev
    except OSError:
        mount = 0
    place = zlib.crc32(f"{socket.gethostname()} {mount}".encode()) >> 1  # a positive int32
    return int(np.sum(gather(place) == place))


def host_count() -> int:
    """Machines that this run's processes are on; also a barrier."""
    boot = ROOT / "proc/sys/kernel/random/boot_id"  # containers of one machine share it
    name = boot.read_text() if boot.exists() else socket.gethostname()
    return len(np.unique(gather(zlib.crc32(name.encode()) >> 1)))  # a positive int32


def _quotas(root: pathlib.Path) -> Iterator[float]:
    """Cores' worth of time, of each group that this process is in and that has a quota."""
    for group in _groups(root):
        for quota, period in (_quota_v2(group), _quota_v1(group)):
            if quota > 0 and period > 0:
                yield quota / period


def _groups(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """The folders of this process's groups and of those around them.

    /proc/self/cgroup has lines HIERARCHY:CONTROLLERS:PATH, none of the controllers in version 2.
    In a container the path may be the host's, of which only the mounted top is seen.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                mounts = [root / CGROUPS]
            elif "cpu" in controllers.split(","):
                mounts = [root / CGROUPS / controllers, root / CGROUPS / "cpu"]
            else:
                mounts = []
            for mount in mounts:
                group = mount / path.lstrip("/")
                yield from (group, *group.parents[: len(group.parts) - len(mount.parts)])


def _quota_v2(group: pathlib.Path) -> tuple[int, int]:
    """Quota and period in microseconds; "max" of a quota is none, here 0."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return 0, 0
    return (int(quota) if quota.isdigit() else 0), int(period)


def _quota_v1(group: pathlib.Path) -> tuple[int, int]:
    try:
        quota = (group / "cpu.cfs_quota_us").read_text()
        return int(quota), int((group / "cpu.cfs_period_us").read_text())  # -1: none
    except (OSError, ValueError):
        return 0, 0
