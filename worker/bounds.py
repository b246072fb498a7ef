"""What planning may take: config.json is a stranger's, and a number in it can ask for anything.

For processes that do nothing but plan.
"""

from __future__ import annotations

import math
import resource
import signal
import sys
from types import FrameType

from pissa_core.cgroups import ROOT, read
from pissa_core.slots import default_budget
from worker.errors import PlanTimeout

MEMORY = 8 << 30
"""Bytes of its own that a process may take while it plans; half of what is free, if that is less.

The plan of the largest model there is takes 2 GB.
"""
CPU_S = 600
"""Seconds of processor time for one plan."""
ABSURD = (
    "a number in its config.json may ask for something absurd; compare it with the model's page"
)


def bound_planning(memory: int = MEMORY, cpu_s: int = CPU_S) -> None:
    """Have this process, from now on, meet a `MemoryError` or a `PlanTimeout` at its bounds.

    Call it from the main thread; once more, and everything is counted anew.
    """
    if sys.platform == "linux":  # elsewhere this limit does not count what is mapped
        _limit(resource.RLIMIT_DATA, _data_bytes() + min(memory, default_budget()))
    used = resource.getrusage(resource.RUSAGE_SELF)
    # Until then the signal must not end the process; later the kernel sends it every second.
    signal.signal(signal.SIGXCPU, _too_long)
    _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + cpu_s)


def _too_long(number: int, frame: FrameType | None) -> None:
    raise PlanTimeout(
        "planning took more processor time than any model needs",
        hint=ABSURD,
    )


def _limit(what: int, wished: int) -> None:
    _, hard = resource.getrlimit(what)
    resource.setrlimit(
        what, (wished if hard == resource.RLIM_INFINITY else min(wished, hard), hard)
    )


def _data_bytes() -> int:
    rows = (line.split() for line in read(ROOT / "proc/self/status").splitlines())
    return next((int(row[1]) * 1024 for row in rows if row[0] == "VmData:"), 0)
