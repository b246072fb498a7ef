"""A process that plans meets its bounds as errors, not as a signal from the kernel."""

from __future__ import annotations

import subprocess
import sys

import pytest

SPIN = "while True: sum(range(1000))"
SWALLOW = """
for _ in range(2):
    try:
        while True: sum(range(1000))
    except Exception as error: caught = error
raise caught
"""


def run(work: str, *, memory: int = 1 << 30, cpu_s: int = 60) -> str:
    """Run `work` under the bounds and return the class of the error that it ends with."""
    code = (
        "from worker.bounds import bound_planning\n"
        f"bound_planning({memory}, {cpu_s})\n"
        f"work = {work!r}\n"
        "try: exec(work)\n"
        "except Exception as error: print(type(error).__name__)\n"
        "else: print('done')\n"
        "import os, sys\n"
        "sys.stdout.flush()\n"
        "os._exit(0)\n"  # as Python ends, signals end the process again
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("work", [SPIN, SWALLOW])
def test_processor_time_is_bounded_even_where_somebody_swallows_the_error(work: str) -> None:
    assert run(work, cpu_s=1) == "PlanTimeout"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts what is mapped")
def test_memory_is_bounded() -> None:
    taken = "held = bytearray({})"
    assert run(taken.format(100 << 20), memory=300 << 20) == "done"
    assert run(taken.format(400 << 20), memory=300 << 20) == "MemoryError"


def test_every_plan_counts_anew() -> None:
    again = (
        "bound_planning(1 << 30, 1)\nimport time\nwhile time.process_time() < start + 0.6: pass\n"
    )
    work = "import time\nfor _ in range(4):\n    start = time.process_time()\n"
    work += "".join(f"    {line}\n" for line in again.splitlines())
    assert run(work, cpu_s=2) == "done"
