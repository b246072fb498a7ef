"""Reading two files side by side, front to back, in pieces of bounded size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from pissa_core.ports import CheckpointSource

PIECE = 4 << 20
"""Bytes compared at a time."""


class Tape:
    """A range of a file, read once from front to back, in pieces of the reader's choosing."""

    def __init__(self, source: CheckpointSource, path: str, start: int, stop: int) -> None:
        """Begin at `start`; `digest` is of what has been taken."""
        self._chunks = source.stream(path, start, stop)
        self._left = memoryview(b"")
        self.position = start
        self.stop = stop
        self.digest = hashlib.sha256()

    def take(self, count: int) -> bytearray:
        """Return the next `count` bytes, in memory of their own.

        Raises:
            EOFError: if the range ends first.
        """
        taken = bytearray(count)
        filled = 0
        while filled < count:
            if not self._left:
                chunk = next(self._chunks, b"")
                if not chunk:
                    raise EOFError(f"the file ends at byte {self.position + filled}")
                self._left = memoryview(chunk)
            some = self._left[: count - filled]
            taken[filled : filled + len(some)] = some
            self._left = self._left[len(some) :]
            filled += len(some)
        self.digest.update(taken)
        self.position += count
        return taken


class Original:
    """Tensors of the original, read in the order they are asked for; cheap where that is theirs."""

    def __init__(self, source: CheckpointSource) -> None:
        self._source = source
        self._tape: Tape | None = None
        self._path = ""

    def open(self, path: str, start: int, stop: int, end: int) -> Tape:
        """Return a tape that stands at `start`, going on where the last one stopped if it can.

        Args:
            path: the shard.
            start: first byte of the tensor.
            stop: the byte behind its last.
            end: how far the shard's data goes, for tensors asked for next.
        """
        tape = self._tape
        if tape is None or self._path != path or tape.position != start or tape.stop < stop:
            self._tape = tape = Tape(self._source, path, start, end)
            self._path = path
        return tape


def pieces(nbytes: int, step: int = PIECE) -> Iterator[tuple[int, int]]:
    """Yield ``(start, stop)`` of pieces of `step` bytes."""
    for start in range(0, nbytes, step):
        yield start, min(start + step, nbytes)


def first_difference(one: bytearray, other: bytearray) -> int:
    """Return where two pieces of one length first differ; they do."""
    low, high = 0, len(one)
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] != other[low:middle]:
            high = middle
        else:
            low = middle
    return low
