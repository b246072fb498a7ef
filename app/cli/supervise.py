"""Worker processes of `pissa serve`: started together, restarted when they die, ended together."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

POLL_S = 0.5
STOP_S = 8.0
FIRST_DELAY_S = 1.0
LONGEST_DELAY_S = 30.0
STEADY_S = 60.0
"""A worker that lived this long died of something new: it is restarted without delay."""


# A bare interpreter sets the death signal and becomes the worker: so no code of ours runs between
# fork and exec, and there is no moment at which the death of `serve` would go unnoticed.
_LEASH = """
import ctypes, os, signal, sys
parent, *command = sys.argv[1:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(signal.SIGTERM), 0, 0, 0)
if os.getppid() != int(parent):
    sys.exit(1)
os.execv(command[0], command)
"""


@dataclass(slots=True)
class _Place:
    """One worker's place: its command, and the process that fills it."""

    command: Sequence[str]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    delay_s: float = field(default=FIRST_DELAY_S)
    due: float = 0.0


class Workers:
    """Keeps one process for each command alive, while the block is open."""

    def __init__(self, commands: Sequence[Sequence[str]], environment: Mapping[str, str]) -> None:
        """Prepare; nothing is started yet."""
        self._places = [_Place(command) for command in commands]
        self._environment = dict(environment)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="workers", daemon=True)

    def __enter__(self) -> Workers:
        """Start all."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End all: SIGTERM, and SIGKILL for what does not end within `STOP_S`."""
        self._stopping.set()
        self._thread.join()

    def _watch(self) -> None:
        # One thread starts, tends and ends the workers: Linux tells a child that its parent has
        # died when the *thread* that made it ends.
        while not self._stopping.is_set():
            for place in self._places:
                self._tend(place)
            self._stopping.wait(POLL_S)
        self._end_all()

    def _end_all(self) -> None:
        running = [place.process for place in self._places if place.process is not None]
        for process in running:
            process.terminate()
        until = time.monotonic() + STOP_S
        for process in running:
            try:
                process.wait(max(until - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _tend(self, place: _Place) -> None:
        now = time.monotonic()
        if place.process is not None:
            status = place.process.poll()
            if status is None:
                return
            self._mourn(place, status, now)
        if now >= place.due:
            # A process group of its own: Ctrl-C is for serve, which then ends the workers.
            leash = [sys.executable, "-I", "-S", "-c", _LEASH, str(os.getpid())]
            place.process = subprocess.Popen(
                [*leash, *place.command],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
            place.started = now

    def _mourn(self, place: _Place, status: int, now: float) -> None:
        steady = now - place.started > STEADY_S
        place.due = now if steady else now + place.delay_s
        place.delay_s = FIRST_DELAY_S if steady else min(2 * place.delay_s, LONGEST_DELAY_S)
        place.process = None
        print(
            f"a worker ended with status {status}; it is started again in "
            f"{max(place.due - now, 0):.0f} s",
            file=sys.stderr,
            flush=True,
        )
