import os
import sys

import pytest

from sret_jax.parallel.host import available_cores, host_count, shared_memory_left

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="cgroups are of Linux")

V2 = "0::/system/run\n"
V1 = "5:cpuset:/\n4:cpu,cpuacct:/docker/abc\n3:memory:/docker/abc\n0::/\n"
MACHINES = {
    "no groups": ({}, 64),
    "no quota": ({"proc/self/cgroup": V2, "sys/fs/cgroup/system/run/cpu.max": "max 100000\n"}, 64),
    "version 2": ({"proc/self/cgroup": V2, "sys/fs/cgroup/system/run/cpu.max": "150000 100000"}, 2),
    "version 2, of the group around it": (
        {"proc/self/cgroup": V2, "sys/fs/cgroup/system/cpu.max": "800000 200000\n"},
        4,
    ),
    "version 2, in a container": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"},
        1,
    ),
    "version 1": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "300000\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        3,
    ),
    "version 1, in a container": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        2,
    ),
    "a quota above the affinity": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "9900000 100000\n"},
        64,
    ),
    "files that make no sense": ({"proc/self/cgroup": "x", "sys/fs/cgroup/cpu.max": "x"}, 64),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_cores_are_those_of_the_affinity_or_fewer_by_the_quota(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    files, cores = MACHINES[machine]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_cores(tmp_path) == cores


def test_shared_memory_is_bounded_by_its_file_system_and_none_where_there_is_no_such(tmp_path):
    assert shared_memory_left(tmp_path) == 0
    (tmp_path / "dev/shm").mkdir(parents=True)
    assert shared_memory_left(tmp_path) > 0


def test_one_process_is_on_one_host():
    assert host_count() == 1
