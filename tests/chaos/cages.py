"""Places too small for the work: a disk that is full, memory that runs out. Both need root."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[Path]:
    """Make `folder` a file system of its own, of so many bytes; skip where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take all room that a disk has left; unlink the file to give it back."""
    ballast = folder / "ballast"
    with ballast.open("wb") as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    return ballast


@contextmanager
def memory_cage() -> Iterator[Path]:
    """Make a memory cgroup below our own; skip where that is not allowed."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        first = "memory" in controllers.split(",")
        tree = Path("/sys/fs/cgroup/memory" if first else "/sys/fs/cgroup")
        cage = tree / path.lstrip("/") / "pissa-chaos"
        with suppress(OSError):
            cage.mkdir(exist_ok=True)  # a scenario that failed may have left it
            if (cage / _limit_of(cage)).exists():
                break
            cage.rmdir()
    else:
        pytest.skip("no memory cgroup can be made here")
    try:
        yield cage
    finally:
        _remove(cage)


def limit_memory(cage: Path, pids: list[int], more: int) -> None:
    """Put processes into the cage, where they may grow by so many bytes."""
    for pid in pids:
        (cage / "cgroup.procs").write_text(str(pid))
    # What they held before they moved counts where they came from.
    (cage / _limit_of(cage)).write_text(str(more))


def _limit_of(cage: Path) -> str:
    return "memory.max" if "cgroup/memory" not in str(cage) else "memory.limit_in_bytes"


def _remove(cage: Path) -> None:
    for _ in range(100):
        with suppress(OSError):
            cage.rmdir()
            return
        time.sleep(0.1)
