"""Run a whole process and measure it: wall time, CPU time, peak memory of its tree.

Imports nothing large: a child's peak memory as the kernel counts it is never below what its
parent held when it was started.
"""

from __future__ import annotations

import os
import platform
import subprocess
import threading
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil

_SAMPLE_S = 0.05


@dataclass(frozen=True)
class Measured:
    """What one process cost.

    Attributes:
        peak_bytes: the largest resident set of one process of the tree as the kernel counted it,
            or of the whole tree as sampled (pages shared between processes counted once),
            whichever is more. Mapped files count.
        peak_anonymous_bytes: the tree's peak without mapped files, sampled.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int
    peak_anonymous_bytes: int
    stdout: str


class Failed(Exception):
    """The measured process did not end with 0."""


def run_measured(command: list[str], **options: object) -> Measured:
    """Run `command` to its end and measure it and its children."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    peaks = {"resident": 0, "anonymous": 0}
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peaks, ended))
    watcher.start()
    streams: dict[str, bytes] = {}
    readers = [
        threading.Thread(target=_drain, args=(process, name, streams))
        for name in ("stdout", "stderr")
    ]
    for reader in readers:
        reader.start()
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    ended.set()
    for thread in (watcher, *readers):
        thread.join()
    if process.returncode != 0:
        text = streams["stderr"].decode(errors="replace")
        raise Failed(f"{' '.join(command)} ended with {process.returncode}:\n{text[-3000:]}")
    return Measured(
        wall_s=wall_s,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_bytes=max(usage.ru_maxrss * 1024, peaks["resident"]),
        peak_anonymous_bytes=peaks["anonymous"],
        stdout=streams["stdout"].decode(),
    )


def _drain(process: subprocess.Popen[bytes], name: str, streams: dict[str, bytes]) -> None:
    with getattr(process, name) as stream:
        streams[name] = stream.read()


def _watch(pid: int, peaks: dict[str, int], ended: threading.Event) -> None:
    root = psutil.Process(pid)
    while not ended.wait(_SAMPLE_S):
        resident = anonymous = 0
        try:
            tree = [root, *root.children(recursive=True)]
        except psutil.Error:
            return
        for process in tree:
            proportional, without_files = _proportional_set(process.pid)
            resident += proportional
            anonymous += without_files
        peaks["resident"] = max(peaks["resident"], resident)
        peaks["anonymous"] = max(peaks["anonymous"], anonymous)


def _proportional_set(pid: int) -> tuple[int, int]:
    """Return a process's share of the memory it maps, all of it and what is anonymous."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it ended meanwhile
        return 0, 0
    sizes = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
    return sizes["Pss:"], sizes["Pss_Anon:"] + sizes["Pss_Shmem:"]


def machine(device: str = "cpu") -> dict[str, object]:
    """Say what was measured on: processor, cores, memory, versions."""
    names = ("torch", "transformers", "peft", "numpy", "scipy")
    described: dict[str, object] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }
    if device.startswith("cuda"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        described["gpu"] = subprocess.check_output(query, text=True).strip()
    return described


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
