"""The body of a request as it comes in: in pieces, counted, and as a fault would have it."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping
from typing import BinaryIO

from hub.faults import Fault
from hub.state import Seen

_PIECE = 1 << 20


class Cut(Exception):
    """The connection shall end here."""


class Body:
    """A request's body, read once; `pieces` keeps no more than one in memory."""

    def __init__(
        self, file: BinaryIO, headers: Mapping[str, str], seen: Seen, fault: Fault | None
    ) -> None:
        self._file, self._seen, self._fault = file, seen, fault
        self._chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        self._left = int(headers.get("content-length", 0))

    def read(self) -> bytes:
        return b"".join(self.pieces())

    def hold(self) -> None:
        """Wait until all of it has come, and keep it for whoever reads it."""
        whole = self.read()
        self._file, self._left, self._fault = io.BytesIO(whole), len(whole), None
        self._seen.received = 0

    def drain(self) -> None:
        """Read what nobody wanted, so that the connection can go on."""
        for _ in self.pieces():
            pass

    def pieces(self) -> Iterator[bytes]:
        fault = self._fault
        for piece in self._chunks() if self._chunked else self._sized():
            start = self._seen.received
            self._seen.received += len(piece)
            yield _corrupted(piece, start, fault)
            if fault and fault.cut_after is not None and self._seen.received >= fault.cut_after:
                raise Cut

    def _step(self) -> int:
        """Say how much to read at a time, and wait where the fault says so."""
        fault = self._fault
        if fault and fault.drip:
            time.sleep(fault.drip_s)
            return fault.drip
        if fault and fault.cut_after is not None:
            return min(_PIECE, max(1, fault.cut_after - self._seen.received))
        return _PIECE

    def _sized(self) -> Iterator[bytes]:
        while self._left:
            piece = self._file.read(min(self._step(), self._left))
            self._left -= len(piece)
            if not piece:
                raise Cut  # the client hung up
            yield piece

    def _chunks(self) -> Iterator[bytes]:
        while self._chunked:
            size = int(self._file.readline().split(b";")[0] or b"0", 16)
            self._left = size
            yield from self._sized()
            self._file.readline()
            self._chunked = size > 0


def _corrupted(piece: bytes, start: int, fault: Fault | None) -> bytes:
    at = fault.corrupt_at - start if fault and fault.corrupt_at is not None else -1
    if not 0 <= at < len(piece):
        return piece
    return piece[:at] + bytes([piece[at] ^ 0xFF]) + piece[at + 1 :]
