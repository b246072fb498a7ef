"""Processes of this machine: who I am, whether another still lives, dying with one's parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

from pissa_core.cgroups import groups, read

_COUNTERS = ("memory.events", "memory.oom_control")
_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG = 1, 2


def holder_id() -> str:
    """Name this process so that any other on the same machine can tell whether it lives.

    The name holds the machine's boot, the PID namespace, the PID and the time it started (in
    clock ticks since boot), so that a PID used again is not taken for it.
    """
    pid = os.getpid()
    return f"{_here()}/{pid}/{_start_of(pid)}"


def is_dead(holder: str) -> bool:
    """Whether a process of this machine has ended; False for one of another machine."""
    here, _, process = holder.partition("/")
    if not here or here != _here():
        return False
    pid, _, start = process.partition("/")
    return _start_of(int(pid)) != start


def die_with_parent(signum: int = signal.SIGKILL) -> None:
    """Have the kernel send `signum` when the thread that started this process ends (Linux).

    Where there is no such call, a process whose parent is gone is found by the lease it lets run
    out.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signum), 0, 0, 0)


def dies_with_parent() -> bool:
    """Whether this process was started on a leash: the kernel signals it when its parent ends."""
    if sys.platform != "linux":
        return False
    signum = ctypes.c_int(0)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_GET_PDEATHSIG, ctypes.byref(signum), 0, 0, 0)
    return signum.value != 0


def peak_memory_bytes() -> int:
    """Return the most memory this process has held since `reset_peak_memory`, or ever."""
    status = read(Path("/proc/self/status"))
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> None:
    """Begin to measure the peak anew, where the kernel can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def oom_kills() -> int:
    """Return how often the kernel has killed for want of memory: in our cgroup, or at all.

    The machine's own counter is asked where there is no cgroup with one (a process of nobody's
    container); it also counts what was killed elsewhere on the machine.
    """
    counters = (group / name for group in groups("memory") for name in _COUNTERS)
    for path in (*counters, Path("/proc/vmstat")):
        rows = (line.split() for line in read(path).splitlines())
        counts = {row[0]: row[1] for row in rows if len(row) == 2}
        if "oom_kill" in counts:
            return int(counts["oom_kill"])
    return 0


def choose_to_die_first() -> None:
    """Have the kernel, when memory runs out, end this process rather than those that watch it."""
    try:
        Path("/proc/self/oom_score_adj").write_text("500")
    except OSError:
        return


def _here() -> str:
    boot = read(Path("/proc/sys/kernel/random/boot_id")).strip()
    try:
        namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - not a path, a name
    except OSError:
        namespace = ""
    return f"{boot}:{namespace}" if boot and namespace else ""


def _start_of(pid: int) -> str | None:
    stat = read(Path(f"/proc/{pid}/stat"))
    # The name, in parentheses, may hold anything; the 22nd field is the 20th behind it. A zombie
    # has ended, whoever has yet to collect it.
    fields = stat.rpartition(")")[2].split()
    return None if len(fields) < 20 or fields[0] in ("Z", "X") else fields[19]
