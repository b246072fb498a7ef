"""Headers made ahead are what the reference library reads; positioned I/O hits its place."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pissa_core.tensorfile import Entry, PatchFile, concatenate, empty, make_header, memory_of

ENTRIES = [
    Entry("a.lora_A.weight", "F32", (2, 3), 24),
    Entry("ä.lora_B.weight", "BF16", (5,), 10),
    Entry("scalar", "F16", (), 2),
    Entry("nothing", "F32", (0, 4), 0),
]


def test_safetensors_reads_what_the_header_promises(tmp_path):
    header = make_header(ENTRIES)
    values = {e.name: torch.rand(e.shape) for e in ENTRIES}
    with PatchFile(tmp_path / "f", create_size=header.file_size) as file:
        file.write(0, header.encoded)
        for entry in ENTRIES:
            tensor, buffer = empty(entry.shape, entry.dtype)
            tensor.copy_(values[entry.name])
            values[entry.name] = tensor
            file.write(header.starts[entry.name], buffer)
        file.sync()
    loaded = load_file(tmp_path / "f")
    assert loaded.keys() == values.keys()
    assert all(torch.equal(loaded[name], values[name]) for name in values)
    with safe_open(tmp_path / "f", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_data_begins_aligned():
    assert len(make_header(ENTRIES).encoded) % 8 == 0


def test_a_file_is_its_header_and_its_bodies(tmp_path):
    header = make_header(ENTRIES)
    bodies = [[bytes(e.nbytes)] for e in ENTRIES]
    (tmp_path / "f").write_bytes(b"".join(concatenate(header, bodies)))
    assert (tmp_path / "f").stat().st_size == header.file_size
    assert load_file(tmp_path / "f").keys() == {e.name for e in ENTRIES}


def test_reading_past_the_end_is_an_error_not_zeros(tmp_path):
    (tmp_path / "f").write_bytes(b"12345")
    with PatchFile(tmp_path / "f") as file, pytest.raises(EOFError, match="byte 5"):
        file.read_into(3, memoryview(bytearray(4)))


def test_a_file_that_finds_no_room_is_closed_again(tmp_path, monkeypatch):
    def full(fd: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pissa_core.tensorfile.reserve", full)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="No space"):
        PatchFile(tmp_path / "part", create_size=10)
    assert os.listdir("/proc/self/fd") == before


def test_a_strided_tensor_has_no_bytes_in_one_piece():
    with pytest.raises(ValueError, match="contiguous"):
        memory_of(torch.rand(3, 4).t())
