"""Positioned reads and writes of safetensors: no mmap, no file held whole, headers known first.

The format (https://github.com/huggingface/safetensors#format): eight bytes of header length,
little-endian; a JSON header; the tensors' bytes, contiguous up to the end of the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pissa_core.openfile import read_into_fd, reserve

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written: its key, dtype in safetensors' spelling, shape and size in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """A header made from entries: its bytes, and where each tensor begins in the file."""

    encoded: bytes
    starts: Mapping[str, int]
    file_size: int


def make_header(entries: Sequence[Entry]) -> Header:
    """Lay the tensors out one after another in the order given.

    The JSON is padded with spaces to a multiple of eight, as the reference writer does, so that
    the data is aligned; the metadata is PEFT's ``{"format": "pt"}``.
    """
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        stop = offset + entry.nbytes
        table[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    encoded = framed(text)
    starts = {}
    position = len(encoded)
    for entry in entries:
        starts[entry.name] = position
        position += entry.nbytes
    return Header(encoded, starts, position)


def framed(text: bytes) -> bytes:
    """Return a header's JSON as a file begins with it, behind its length."""
    return len(text).to_bytes(8, "little") + text


def empty(
    shape: tuple[int, ...], dtype: str, *, pinned: bool = False, memory: Tensor | None = None
) -> tuple[Tensor, memoryview]:
    """Return an uninitialised tensor and the writable bytes behind it.

    Args:
        shape: of the tensor.
        dtype: in safetensors' spelling.
        pinned: whether memory of its own is to be page-locked.
        memory: uint8, at least as large: the tensor lies there. None: in memory of its own.
    """
    if memory is None:
        tensor = torch.empty(shape, dtype=TORCH_DTYPES[dtype], pin_memory=pinned)
    else:
        nbytes = math.prod(shape) * TORCH_DTYPES[dtype].itemsize
        tensor = memory[:nbytes].view(TORCH_DTYPES[dtype]).view(shape)
    return tensor, memory_of(tensor)


def memory_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy, in storage order."""
    if not tensor.is_contiguous():
        raise ValueError("only a contiguous tensor has its bytes in one piece")
    return tensor.view(-1).view(torch.uint8).numpy().data


class PatchFile:
    """A file opened for positioned reads and writes; several threads may use it at once."""

    def __init__(self, path: Path, *, create_size: int | None = None) -> None:
        """Open `path`; with `create_size`, create it with that many bytes reserved on disk."""
        flags = os.O_RDWR | os.O_CLOEXEC
        if create_size is not None:
            flags |= os.O_CREAT | os.O_TRUNC
        self._fd = os.open(path, flags, 0o644)
        if create_size:
            try:
                reserve(self._fd, create_size)
            except OSError:
                os.close(self._fd)
                raise

    def __enter__(self) -> PatchFile:
        return self

    def __exit__(self, *_: object) -> None:
        # A thread that has not noticed yet writes to no file rather than to another.
        fd, self._fd = self._fd, -1
        os.close(fd)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start` on."""
        read_into_fd(self._fd, start, buffer)

    def write(self, start: int, data: memoryview | bytes) -> None:
        """Write all of `data` from byte `start` on."""
        view = memoryview(data)
        written = 0
        while written < len(view):
            written += os.pwrite(self._fd, view[written:], start + written)

    def write_all(self, start: int, chunks: Iterable[bytes]) -> None:
        """Write chunks one behind the other, the first from byte `start` on."""
        for chunk in chunks:
            self.write(start, chunk)
            start += len(chunk)

    def sync(self) -> None:
        """Return once everything written is on the disk."""
        os.fsync(self._fd)

    def let_go(self, stop: int) -> None:
        """Ask the system to keep no byte before `stop` in memory that is on the disk."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # advice, of which some file systems know nothing
                os.posix_fadvise(self._fd, 0, stop, os.POSIX_FADV_DONTNEED)


def concatenate(header: Header, bodies: Iterable[Iterable[bytes]]) -> Iterator[bytes]:
    """Yield a whole file: the header, then each body in turn."""
    yield header.encoded
    for body in bodies:
        yield from body
