"""Open files: whole ranges, and room beforehand. Importing this module loads no torch."""

from __future__ import annotations

import os

CHUNK = 8 << 20
"""Bytes in hand at a time where a file is read or written from end to end."""


def read_into_fd(fd: int, start: int, buffer: memoryview) -> None:
    """Fill `buffer` from an open file, beginning at byte `start`.

    Raises:
        EOFError: if the file ends first.
    """
    filled = 0
    while filled < len(buffer):
        count = os.preadv(fd, [buffer[filled:]], start + filled)
        if count == 0:
            raise EOFError(f"the file ends at byte {start + filled}")
        filled += count


def reserve(fd: int, size: int) -> None:
    """Give an open file `size` bytes of disk now, so that a full disk shows before the work."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
    else:
        os.ftruncate(fd, size)
