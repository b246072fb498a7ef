"""What a container leaves of the machine: memory and cores of the cgroups this process is in.

A limit holds for everything below the group that has it, so every group up to the root is asked.
Both versions are read, whichever the process is in. A container may see its own group as the root
of the tree, whatever its path is called.
Source: the kernel's admin-guide/cgroup-v2.rst and admin-guide/cgroup-v1/memory.rst.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
_TREE = "sys/fs/cgroup"


def memory_left(root: Path = ROOT) -> int | None:
    """Return the bytes this process may still take before a cgroup's limit; None: no limit.

    The page cache of files counts as free, as the kernel drops it first.

    Args:
        root: where ``proc`` and ``sys`` are found.
    """
    left = [limit - _held(group) for group in groups("memory", root) for limit in _limits(group)]
    return max(0, min(left)) if left else None


def cores_allowed(root: Path = ROOT) -> float | None:
    """Return how many cores' worth of time the cgroups grant; None: no limit."""
    quotas = [share for group in groups("cpu", root) for share in _shares(group)]
    return min(quotas, default=None)


def groups(controller: str, root: Path = ROOT) -> Iterator[Path]:
    """Yield the folders of the groups that may bound this process, its own first."""
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            trees = [root / _TREE, root / _TREE / "unified"]
        elif controller in controllers.split(","):
            trees = [root / _TREE / controller]
        else:
            continue
        for tree in trees:
            folder = Path(path.lstrip("/"))
            if ".." not in folder.parts:  # a group outside of what this process can see
                yield from (tree / part for part in (folder, *folder.parents) if part != Path())
            yield tree


def read(path: Path) -> str:
    """Return what a file of the kernel's says; nothing, if it is not there."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _limits(group: Path) -> Iterator[int]:
    # Above memory.high the kernel makes a process wait, so long that it might as well be killed.
    for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
        limit = read(group / name).strip()
        if limit.isdecimal():
            yield int(limit)


def _held(group: Path) -> int:
    used = next(
        (
            int(said)
            for name in ("memory.current", "memory.usage_in_bytes")
            if (said := read(group / name).strip()).isdecimal()
        ),
        0,
    )
    rows = (line.split() for line in read(group / "memory.stat").splitlines())
    counts = {row[0]: int(row[1]) for row in rows if len(row) == 2}
    # The first version counts what is below a group under names of its own.
    total = "total_" if "total_inactive_file" in counts else ""
    cached = (counts.get(f"{total}{kind}_file", 0) for kind in ("active", "inactive"))
    return max(0, used - sum(cached))


def _shares(group: Path) -> Iterator[float]:
    first = [read(group / f"cpu.cfs_{what}_us").strip() for what in ("quota", "period")]
    quota, period = (read(group / "cpu.max").split() or first)[:2]
    if quota.isdecimal() and period.isdecimal() and int(period):
        yield int(quota) / int(period)
