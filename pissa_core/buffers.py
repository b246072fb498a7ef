"""Memory of matrices that are done, for those that follow."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_ROOMY = 4  # times what is wanted: a buffer larger than that is given up rather than lent


class Buffers:
    """Buffers that are given back to be taken again; safe to use from several threads.

    Fresh memory comes from the kernel page by page, each cleared first: a sixth of all time at low
    ranks. No more is held than was in use at once; where nothing fits, all that is free goes.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._lock = threading.Lock()

    @contextmanager
    def taken(self, nbytes: int) -> Iterator[Tensor]:
        """Yield uint8 memory of at least `nbytes` bytes, not initialised, aligned as torch's."""
        buffer = self._find(nbytes)
        if buffer is None:
            buffer = torch.empty(nbytes, dtype=torch.uint8)
        try:
            yield buffer
        finally:
            with self._lock:
                self._free.append(buffer)

    def _find(self, nbytes: int) -> Tensor | None:
        with self._lock:
            fitting = [one for one in self._free if nbytes <= len(one) <= _ROOMY * nbytes]
            if not fitting:
                self._free.clear()
                return None
            best = min(fitting, key=len)
            self._free = [one for one in self._free if one is not best]
            return best
