"""Disk that work in progress may take: one ledger for all threads and processes of a worker.

A reservation is a file that its owner keeps locked, so one whose owner was killed is known at
once. What the dead left on the disk still counts, until it is adopted or makes room::

    .ledger.lock        held while somebody counts
    .TOKEN.reserved     bytes and scratch folder of one reservation, locked by its owner
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from pissa_core.adapters.disk import allocated, make_folder, nearest_existing, try_lock
from pissa_core.adapters.local.scratch import discard_scratch
from pissa_core.errors import DiskTooSmall

_GUARD = ".ledger.lock"
_RESERVATIONS = ".*.reserved"
_SPARE = 20  # without a budget, one part in so many of the free disk is left to others
_ADOPTED_WITHIN_S = 10.0  # after this long what the dead left makes room for the living


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a reservation says."""

    nbytes: int
    scratch: Path | None


@dataclass(frozen=True, slots=True)
class _Count:
    """What the reservations come to; `own`: that of a dead attempt whose scratch is ours now."""

    reserved: int
    on_disk: int
    left_by_the_dead: tuple[Path, ...]
    own: Path | None


class Ledger:
    """A budget of bytes, and who has reserved how many of them."""

    def __init__(self, folder: Path, budget: int | None = None) -> None:
        """Open no file yet.

        Args:
            folder: where the reservations lie; on the disk of the scratch if there is no budget.
            budget: bytes; None: what is free on the folder's disk, but for a spare part.
        """
        self._folder = folder
        self.budget = budget

    def capacity(self) -> int:
        """Return the bytes that work in progress may take, what it has already included."""
        if self.budget is not None:
            return self.budget
        if not self._folder.is_dir():
            return self._free()
        with self._counting():
            return self._capacity(self._count(None))

    def try_hold(self, nbytes: int, scratch: Path | None, *, waited_s: float) -> Reservation | None:
        """Reserve bytes for a scratch folder; None if there is no room for them now.

        What a dead attempt has reserved for the same folder is taken over, whether or not there
        is room: its bytes are on the disk already.

        Args:
            nbytes: the most that will lie in the folder.
            scratch: the folder; None for work that leaves nothing behind when it is killed.
            waited_s: how long the caller has been trying.

        Raises:
            DiskTooSmall: if there will never be room.
        """
        make_folder(self._folder)
        with self._counting():
            count = self._count(scratch)
            capacity = self._capacity(count)
            if nbytes > capacity:
                raise disk_too_small(nbytes, capacity, what="the next shard")
            if count.own is not None or count.reserved + nbytes <= capacity:
                if count.own is not None:
                    count.own.unlink()
                return self._reserve(nbytes, scratch)
            if waited_s > _ADOPTED_WITHIN_S:
                for folder in count.left_by_the_dead[:1]:
                    discard_scratch(folder)
        return None

    def sweep(self) -> None:
        """Forget what the dead reserved for scratch that is gone, and remove what they locked."""
        if any(self._folder.glob(".*")):
            with self._counting():
                self._count(None)

    def release(self, reservation: Reservation) -> None:
        """Give the bytes back; of what is left in the scratch, account as left by the dead."""
        with self._counting():
            if reservation.scratch is None or not reservation.scratch.exists():
                reservation.path.unlink(missing_ok=True)
            os.close(reservation.lock)

    def _capacity(self, count: _Count) -> int:
        return self._free() + count.on_disk if self.budget is None else self.budget

    def _free(self) -> int:
        free = shutil.disk_usage(nearest_existing(self._folder)).free
        return free - free // _SPARE

    def _reserve(self, nbytes: int, scratch: Path | None) -> Reservation:
        path = self._folder / f".{secrets.token_hex(8)}.reserved"
        lock = try_lock(path)
        if lock is None:
            raise RuntimeError(f"a fresh lock, {path}, is already held")
        entry = {"nbytes": nbytes, "scratch": None if scratch is None else str(scratch)}
        os.write(lock, json.dumps(entry).encode())
        return Reservation(self, path, lock, scratch)

    def _count(self, scratch: Path | None) -> _Count:
        reserved = on_disk = 0
        left: list[Path] = []
        own = None
        for path in sorted(self._folder.glob(_RESERVATIONS), key=lambda path: path.stat().st_mtime):
            entry = _read(path)
            on_disk += allocated(entry.scratch) if entry.scratch else 0
            lock = try_lock(path)
            if lock is not None:
                os.close(lock)
                if entry.scratch is None or not entry.scratch.exists():
                    path.unlink()
                    continue
                if entry.scratch == scratch:
                    own = path
                    continue
                left.append(entry.scratch)
            reserved += entry.nbytes
        return _Count(reserved, on_disk, tuple(left), own)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        fd = _lock(self._folder / _GUARD)
        try:
            yield
        finally:
            if not any(self._folder.glob(_RESERVATIONS)):
                (self._folder / _GUARD).unlink(missing_ok=True)
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Reservation:
    """Bytes of disk that are ours until the block ends, or this process."""

    ledger: Ledger
    path: Path
    lock: int
    scratch: Path | None

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.ledger.release(self)


def disk_too_small(
    nbytes: int, capacity: int, *, what: str, least: int | None = None
) -> DiskTooSmall:
    """Return the error that says what needs how much, and how much there is.

    `least` is the budget that would do for all of the work, where something else needs more.
    """
    return DiskTooSmall(
        f"{what} needs {nbytes:,} bytes of scratch at once and the disk budget is {capacity:,}",
        hint=least_budget(least or nbytes),
    )


def least_budget(nbytes: int) -> str:
    """Say what disk budget would do."""
    return (
        f"the least that would do is --disk-budget {nbytes} (PISSA_DISK_BUDGET); as much must be "
        "free"
    )


def _lock(path: Path) -> int:
    """Wait for the lock of a file that whoever had it before may have removed."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(fd, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(fd).st_ino:
                return fd
        os.close(fd)


def _read(path: Path) -> _Entry:
    with suppress(ValueError, KeyError, TypeError):
        entry = json.loads(path.read_bytes())
        scratch = entry["scratch"]
        return _Entry(int(entry["nbytes"]), None if scratch is None else Path(scratch))
    return _Entry(0, None)  # its owner was killed before it had written it
