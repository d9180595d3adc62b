"""What the host or container grants this process: cores, memory and shared memory."""

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
CGROUP_LIMIT = pathlib.Path("/sys/fs/cgroup/memory.max")  # a container sees its own limit here


def available_cores(root: pathlib.Path = ROOT) -> int:
    """The number of cores that this process may use, by its affinity and its cgroup's quota.

    Args:
      root: root of the file system that contains the quota.
    """
    if sys.platform != "linux":
        return os.cpu_count() or 1
    return min([len(os.sched_getaffinity(0)), *map(math.ceil, _quotas(root))])


def machine_memory(limit: pathlib.Path = CGROUP_LIMIT) -> int:
    """The memory of the machine in bytes, or the limit of its container.

    Args:
      limit: the file with the limit; it may contain "max" or be missing.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):
        return min(machine, int(limit.read_text()))
    return machine


def shared_memory_left(root: pathlib.Path = ROOT) -> int | None:
    """The free shared memory in bytes; None if no file system limits it.

    Args:
      root: root of the file system.
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
    """How many processes of this run use the same shared memory; the first call is a barrier."""
    if jax.process_count() == 1:
        return 1
    try:
        mount = (ROOT / SHARED_MEMORY).stat().st_dev
    except OSError:
        mount = 0
    place = zlib.crc32(f"{socket.gethostname()} {mount}".encode()) >> 1  # a positive int32
    return int(np.sum(gather(place) == place))


def host_count() -> int:
    """The number of machines that this run's processes are on; also a barrier."""
    boot = ROOT / "proc/sys/kernel/random/boot_id"  # the same in all containers of a machine
    name = boot.read_text() if boot.exists() else socket.gethostname()
    return len(np.unique(gather(zlib.crc32(name.encode()) >> 1)))  # a positive int32


def _quotas(root: pathlib.Path) -> Iterator[float]:
    """The quota, in cores, of each cgroup of this process that has one."""
    for group in _groups(root):
        for quota, period in (_quota_v2(group), _quota_v1(group)):
            if quota > 0 and period > 0:
                yield quota / period


def _groups(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """The folders of this process's cgroups and of their parents.

    /proc/self/cgroup has lines HIERARCHY:CONTROLLERS:PATH, without controllers in version 2. In a
    container the path may be the host's, of which only the top is mounted.
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
    """Quota and period in microseconds; the quota is 0 where the file contains "max", no limit."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return 0, 0
    return (int(quota) if quota.isdigit() else 0), int(period)


def _quota_v1(group: pathlib.Path) -> tuple[int, int]:
    try:
        quota = (group / "cpu.cfs_quota_us").read_text()
        return int(quota), int((group / "cpu.cfs_period_us").read_text())  # -1: no quota
    except (OSError, ValueError):
        return 0, 0
