"""Who goes next where several shards are under way at once: disk, the line, the device.

While one shard computes, the next downloads and the last uploads. One at a time downloads, so
that the first is there soon; one at a time computes, so that memory is that of one. Whoever waits
yields `Waiting` again and again, and so can be called off.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol

from pissa_core.adapters.ledger import Ledger
from pissa_core.events import Waiting

_LOOK_UP_S = 0.2
_POLL_S = 0.02

Leave = Callable[[], None]


class Gate(Protocol):
    """Lets one through at a time."""

    def enter(self, timeout_s: float) -> Leave | None:
        """Return what to call on leaving, or None if another was inside all the while."""


class ThreadGate:
    """A gate for the threads of one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def enter(self, timeout_s: float) -> Leave | None:
        """Enter, or give up."""
        return self._lock.release if self._lock.acquire(timeout=timeout_s) else None


class FileGate:
    """A gate for threads and processes alike; one that is killed inside leaves it open."""

    def __init__(self, path: Path) -> None:
        """Use the file at `path`, whose folder exists."""
        self._path = path

    def enter(self, timeout_s: float) -> Leave | None:
        """Enter, or give up."""
        deadline = time.monotonic() + timeout_s
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(_POLL_S)
                    continue
                os.close(fd)
                return None
            return lambda: os.close(fd)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What shards under way share; None: there is nobody to share it with, or no limit.

    Attributes:
        line: passed for a download.
        device: passed for the arithmetic.
        ledger: of the disk.
    """

    line: Gate | None = None
    device: Gate | None = None
    ledger: Ledger | None = None

    def passage(self, shard: str) -> Passage:
        """Return the way of one shard through all of it."""
        return Passage(shard, self)


@dataclass(slots=True)
class Passage:
    """One shard's way; whatever it still holds is given back when the block ends."""

    shard: str
    traffic: Traffic
    _held: ExitStack = field(default_factory=ExitStack)
    _leave_line: Leave | None = None
    _leave_device: Leave | None = None

    def __enter__(self) -> Passage:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.computed()
        self.fetched()
        self._held.close()

    def to_disk(self, nbytes: int, scratch: Path | None) -> Iterator[Waiting]:
        """Wait for room on the disk.

        Raises:
            DiskTooSmall: if there will never be enough.
        """
        ledger, began = self.traffic.ledger, time.monotonic()
        if ledger is None:
            return
        while True:
            waited_s = time.monotonic() - began
            reservation = ledger.try_hold(nbytes, scratch, waited_s=waited_s)
            if reservation is not None:
                self._held.enter_context(reservation)
                return
            yield Waiting(self.shard)
            time.sleep(_LOOK_UP_S)

    def to_line(self) -> Iterator[Waiting]:
        """Wait until nobody else downloads, or has downloaded and waits for the device."""
        if self.traffic.line is not None:
            self._leave_line = yield from self._through(self.traffic.line)

    def fetched(self) -> None:
        """Let the next download begin."""
        if self._leave_line is not None:
            self._leave_line()
            self._leave_line = None

    def to_device(self) -> Iterator[Waiting]:
        """Wait until nobody else computes; then the next download may begin."""
        if self.traffic.device is not None:
            self._leave_device = yield from self._through(self.traffic.device)
        self.fetched()

    def computed(self) -> None:
        """Let the next shard compute."""
        if self._leave_device is not None:
            self._leave_device()
            self._leave_device = None

    def _through(self, gate: Gate) -> Generator[Waiting, None, Leave]:
        while True:
            leave = gate.enter(_LOOK_UP_S)
            if leave is not None:
                return leave
            yield Waiting(self.shard)
