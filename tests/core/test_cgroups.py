"""What a container may take, read from trees as kernels and container engines lay them out."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from pissa_core.cgroups import cores_allowed, memory_left
from pissa_core.slots import default_budget, usable_cores

GIB = 1 << 30
UNLIMITED_V1 = str(9223372036854771712)
V2_STAT = "anon 5\ninactive_file {inactive}\nactive_file {active}\n"
V1_STAT = "inactive_file 1\nactive_file 1\ntotal_inactive_file {inactive}\ntotal_active_file 0\n"

# A pod of 8 GiB on a host; its container's own group has no limit; 3 GiB are held, 1 a cache.
V2 = {
    "proc/self/cgroup": "0::/kubepods/pod1/box\n",
    "sys/fs/cgroup/kubepods/pod1/box/memory.max": "max\n",
    "sys/fs/cgroup/kubepods/pod1/box/cpu.max": "max 100000\n",
    "sys/fs/cgroup/kubepods/pod1/memory.max": f"{8 * GIB}\n",
    "sys/fs/cgroup/kubepods/pod1/memory.current": f"{3 * GIB}\n",
    "sys/fs/cgroup/kubepods/pod1/memory.stat": V2_STAT.format(inactive=GIB // 2, active=GIB // 2),
    "sys/fs/cgroup/kubepods/pod1/cpu.max": "150000 100000\n",
}
V2_NAMESPACE = {
    "proc/self/cgroup": "0::/\n",
    "sys/fs/cgroup/memory.max": f"{8 * GIB}\n",
    "sys/fs/cgroup/memory.high": f"{7 * GIB}\n",
    "sys/fs/cgroup/memory.current": f"{GIB}\n",
    "sys/fs/cgroup/cpu.max": "50000 100000\n",
}
V1 = {
    "proc/self/cgroup": "5:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n0::/docker/1\n",
    "sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes": f"{8 * GIB}\n",
    "sys/fs/cgroup/memory/docker/1/memory.usage_in_bytes": f"{3 * GIB}\n",
    "sys/fs/cgroup/memory/docker/1/memory.stat": V1_STAT.format(inactive=GIB),
    "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED_V1,
    "sys/fs/cgroup/cpu/docker/1/cpu.cfs_quota_us": "150000\n",
    "sys/fs/cgroup/cpu/docker/1/cpu.cfs_period_us": "100000\n",
}
# The engine shows the container its own group as the root, but not so in /proc.
V1_MOUNTED = {
    "proc/self/cgroup": "5:memory:/docker/1\n3:cpu:/docker/1\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{8 * GIB}\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{2 * GIB}\n",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
}
OUT_OF_SIGHT = {**V2_NAMESPACE, "proc/self/cgroup": "0::/../../etc\n"}


def tree(folder: Path, files: dict[str, str]) -> Path:
    for path, content in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)
    return folder


@pytest.mark.parametrize(
    ("files", "left", "cores"),
    [
        (V2, 6 * GIB, 1.5),
        (V2_NAMESPACE, 6 * GIB, 0.5),
        (V1, 6 * GIB, 1.5),
        (V1_MOUNTED, 6 * GIB, None),
        (OUT_OF_SIGHT, 6 * GIB, 0.5),
    ],
)
def test_a_container_s_limits_are_found(tmp_path, files, left, cores):
    root = tree(tmp_path, files)
    assert memory_left(root) == left
    assert cores_allowed(root) == cores


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": "0::/user.slice\n", "sys/fs/cgroup/user.slice/memory.max": "max\n"},
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "\n",
            "sys/fs/cgroup/cpu.max": "",
        },
    ],
)
def test_without_a_limit_there_is_none(tmp_path, files):
    root = tree(tmp_path, files)
    assert memory_left(root) is None
    assert cores_allowed(root) is None
    assert usable_cores(root) == len(os.sched_getaffinity(0))


def test_the_budget_is_half_of_what_the_container_has_left(tmp_path, monkeypatch):
    root = tree(tmp_path, V2)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(512 * GIB))
    assert default_budget(root) == 3 * GIB
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(2 * GIB))
    assert default_budget(root) == GIB


def test_a_container_that_holds_more_than_it_may_has_nothing_left(tmp_path):
    root = tree(tmp_path, {**V2_NAMESPACE, "sys/fs/cgroup/memory.current": str(9 * GIB)})
    assert (memory_left(root), default_budget(root)) == (0, 0)


def test_a_part_of_a_core_is_one_slot(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert usable_cores(tree(tmp_path / "half", V2_NAMESPACE)) == 1
    assert usable_cores(tree(tmp_path / "more", V2)) == 2
    assert usable_cores(tree(tmp_path / "all", V1_MOUNTED)) == 64


class Memory:
    def __init__(self, available: int) -> None:
        self.available = available
