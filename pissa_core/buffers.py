"""Memory of matrices that are done, for those that follow."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Buffers:
    """Buffers that are given back to be taken again; safe to use from several threads.

    Fresh memory comes from the kernel page by page, each cleared first: a sixth of all time at low
    ranks. What is held beyond what was asked for (buffers that nobody has, and what a buffer is
    larger than wanted) stays within `spare` bytes.
    """

    def __init__(self, spare: int = 0) -> None:
        self._spare, self._expected = spare, 0
        self._free: list[Tensor] = []
        self._unused = 0  # bytes of buffers taken that nobody asked for
        self._closed = False
        self._lock = threading.Lock()

    def expect(self, nbytes: int, spare: int) -> None:
        """Have `nbytes` be asked for soon, and hold at most `spare` besides from then on."""
        with self._lock:
            self._expected += nbytes
            self._spare = max(0, spare)

    @contextmanager
    def taken(self, nbytes: int) -> Iterator[Tensor]:
        """Yield uint8 memory of at least `nbytes` bytes, not initialised, aligned as torch's.

        What an error ends is not kept: it may say that there is too little memory.
        """
        buffer = self._find(nbytes)
        if buffer is None:
            buffer = torch.empty(nbytes, dtype=torch.uint8)
        unused = len(buffer) - nbytes
        try:
            yield buffer
            with self._lock:
                if not self._closed:
                    self._free.append(buffer)
        finally:
            with self._lock:
                self._unused -= unused

    def clear(self) -> None:
        """Let go of what nobody has."""
        with self._lock:
            self._free.clear()

    def close(self) -> None:
        """Let go of what nobody has, and of what is given back from now on."""
        with self._lock:
            self._closed = True
            self._free.clear()

    def _find(self, nbytes: int) -> Tensor | None:
        with self._lock:
            self._expected = max(0, self._expected - nbytes)
            fitting = [
                one for one in self._free if 0 <= len(one) - nbytes <= self._spare - self._unused
            ]
            best = min(fitting, key=len, default=None)
            if best is not None:
                self._free = [one for one in self._free if one is not best]
                self._unused += len(best) - nbytes
            self._free.sort(key=len)
            # What is expected will take from it as much.
            while self._free and self._held() - self._expected > self._spare:
                self._free.pop()
            return best

    def _held(self) -> int:
        return self._unused + sum(map(len, self._free))
