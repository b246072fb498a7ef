"""A file that is patched in any order: checksum and disk follow while the work goes on.

Done at the end, the checksum of a 5 GB shard takes seconds on one core while the others have
nothing to do, and the disk gets everything at once. What is on the disk, and is not read again, is
let go of in memory, so that a shard is written through the same few pages: new ones for every byte
push out what others hold there, and where a host has yet to find them for its guest cost several
times the writing. What stays as it is in the source is copied on the way, too.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from pissa_core.openfile import CHUNK
from pissa_core.ports import ByteRange, FileInfo
from pissa_core.tensorfile import PatchFile

# Bytes after which what is written goes to the disk.
_SYNC_EVERY = 64 << 20


@dataclass(frozen=True, slots=True)
class Copying:
    """What of a file is still to be copied from elsewhere.

    Attributes:
        ranges: ascending.
        read_into: fills a buffer with the bytes that belong where a range, or a part of one,
            begins.
    """

    ranges: tuple[ByteRange, ...]
    read_into: Callable[[int, memoryview], None]


class Settling:
    """The sha256 of a file, taken up to the first range that is still to be written.

    Call `done` after each range is written, from any thread, and `finish` when all are.
    """

    def __init__(
        self,
        file: PatchFile,
        size: int,
        unwritten: Iterable[ByteRange],
        copying: Copying | None = None,
        *,
        read_again: bool = False,
    ) -> None:
        """Begin; `read_again` keeps in memory what is soon read, as by an upload."""
        self._file, self._size, self._read_again = file, size, read_again
        self._unwritten = {start for start, _ in unwritten}
        self._copying = copying or Copying((), file.read_into)
        self._pending = deque(self._copying.ranges)
        self._lock, self._closed = threading.Lock(), False
        self._digest, self._position, self._synced = hashlib.sha256(), 0, 0
        self._buffer = memoryview(bytearray(min(size, CHUNK)))
        # One thread, so that what is hashed is hashed in order; one that waits for the disk.
        self._hasher = ThreadPoolExecutor(1, "checksum")
        self._syncer = ThreadPoolExecutor(1, "sync")
        self._syncs: list[Future[None]] = []
        self._following = self._hasher.submit(self._follow, self._frontier())

    def done(self, start: int) -> None:
        """Note that the range that begins at `start` has its final bytes.

        Raises:
            PissaError, OSError: whatever went wrong meanwhile as something was copied.
        """
        with self._lock:
            self._unwritten.discard(start)
            before = self._following
            self._following = self._hasher.submit(self._follow, self._frontier())
        if before.done():
            before.result()

    def finish(self) -> FileInfo:
        """Return size and checksum once the file is whole on the disk.

        Raises:
            PissaError, OSError: if the disk failed, or what is copied could not be read.
        """
        self._syncs.append(self._syncer.submit(self._file.sync))
        self._hasher.submit(self._follow, self._size).result()
        self._syncs.append(self._syncer.submit(self._file.sync))  # what was copied since
        for sync in self._syncs:
            sync.result()
        return FileInfo(self._size, self._digest.hexdigest())

    def close(self) -> None:
        """Stop; waits for the piece that is under way."""
        self._closed = True
        self._hasher.shutdown(cancel_futures=True)
        self._syncer.shutdown(cancel_futures=True)

    def _frontier(self) -> int:
        return min(self._unwritten, default=self._size)

    def _follow(self, frontier: int) -> None:
        while self._position < frontier and not self._closed:
            stop, copied = self._next_piece(frontier)
            piece = self._buffer[: stop - self._position]
            if copied:
                self._copying.read_into(self._position, piece)
                self._file.write(self._position, piece)
            else:
                self._file.read_into(self._position, piece)
            self._digest.update(piece)
            self._position += len(piece)
            if self._position - self._synced >= _SYNC_EVERY:
                self._synced = self._position
                self._syncs.append(self._syncer.submit(self._settle, self._position))

    def _next_piece(self, frontier: int) -> tuple[int, bool]:
        """Return where the piece that begins here ends, and whether it is to be copied."""
        while self._pending and self._pending[0][1] <= self._position:
            self._pending.popleft()
        start, stop = self._pending[0] if self._pending else (self._size, self._size)
        copied = start <= self._position
        return min(self._position + CHUNK, frontier, stop if copied else start), copied

    def _settle(self, stop: int) -> None:
        self._file.sync()
        if not self._read_again:
            self._file.let_go(stop)
