"""The checksum that follows a file being patched is that of the file as it ends up."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from pissa_core.errors import SourceChanged
from pissa_core.openfile import CHUNK
from pissa_core.ports import FileInfo
from pissa_core.settling import Copying, Settling
from pissa_core.tensorfile import PatchFile


@pytest.mark.parametrize("size", [0, 1, 4000, CHUNK + 5, 3 * CHUNK])
@pytest.mark.parametrize("seed", range(3))
def test_ranges_in_any_order_from_any_thread(size, seed, tmp_path):
    chance = random.Random(seed)
    path = tmp_path / "file"
    path.write_bytes(b"\xff" * size)
    cuts = sorted({0, size, *(chance.randrange(size + 1) for _ in range(9))})
    ranges = [pair for pair in pairwise(cuts) if chance.random() < 0.7]
    order = chance.sample(ranges, len(ranges))
    with PatchFile(path) as file:
        settling = Settling(file, size, ranges)

        def write(span: tuple[int, int]) -> None:
            file.write(span[0], random.Random(span[0]).randbytes(span[1] - span[0]))
            settling.done(span[0])

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(write, order))
        said = settling.finish()
        settling.close()
    content = path.read_bytes()
    assert said.size == len(content) == size
    assert said.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("seed", range(6))
def test_what_is_copied_on_the_way_is_what_the_source_has(seed, tmp_path):
    chance, size = random.Random(seed), 2 * CHUNK + 77
    source = random.Random(-seed).randbytes(size)
    (tmp_path / "file").write_bytes(b"\xff" * size)  # what no range covers is there already
    cuts = sorted({0, size, *(chance.randrange(size + 1) for _ in range(20))})
    kinds = {pair: chance.choice(["written", "copied", "there"]) for pair in pairwise(cuts)}
    unwritten, copied = ([p for p in kinds if kinds[p] == kind] for kind in ("written", "copied"))

    def read_into(start: int, buffer: memoryview) -> None:
        buffer[:] = source[start : start + len(buffer)]

    with PatchFile(tmp_path / "file") as file:
        settling = Settling(file, size, unwritten, Copying(tuple(copied), read_into))
        for start, stop in chance.sample(unwritten, len(unwritten)):
            file.write(start, bytes(stop - start))
            settling.done(start)
        said = settling.finish()
        settling.close()
    expected = b"".join(
        {"written": bytes(b - a), "copied": source[a:b], "there": b"\xff" * (b - a)}[kind]
        for (a, b), kind in kinds.items()
    )
    assert (tmp_path / "file").read_bytes() == expected
    assert said == FileInfo(size, hashlib.sha256(expected).hexdigest())


def test_what_cannot_be_copied_is_told_while_the_work_goes_on(tmp_path):
    (tmp_path / "file").write_bytes(bytes(100))

    def gone(start: int, buffer: memoryview) -> None:
        raise SourceChanged("the source has gone")

    with PatchFile(tmp_path / "file") as file:
        settling = Settling(file, 100, [(50, 60), (70, 80)], Copying(((0, 50),), gone))
        settling._following.exception()  # waits
        with pytest.raises(SourceChanged):
            settling.done(50)
        with pytest.raises(SourceChanged):
            settling.finish()
        settling.close()


def test_it_copies_no_further_once_it_is_closed(tmp_path):
    begun, go_on, read = threading.Event(), threading.Event(), []

    def slow(start: int, buffer: memoryview) -> None:
        read.append(start)
        begun.set()
        assert go_on.wait(30)

    with PatchFile(tmp_path / "file", create_size=5 * CHUNK) as file:
        settling = Settling(file, 5 * CHUNK, [], Copying(((0, 5 * CHUNK),), slow))
        assert begun.wait(30)
        closing = threading.Thread(target=settling.close)
        closing.start()
        while not settling._closed:
            time.sleep(0.001)
        go_on.set()
        closing.join()
    assert read == [0]


def test_a_file_that_ends_too_soon_is_an_error(tmp_path):
    (tmp_path / "file").write_bytes(b"short")
    with PatchFile(tmp_path / "file") as file:
        settling = Settling(file, 100, [])
        with pytest.raises(EOFError):
            settling.finish()
        settling.close()


@pytest.mark.parametrize("read_again", [False, True])
def test_what_is_on_the_disk_is_let_go_of_in_memory(read_again, tmp_path, monkeypatch):
    monkeypatch.setattr("pissa_core.settling._SYNC_EVERY", CHUNK)
    size, step = 8 * CHUNK, CHUNK // 2
    with PatchFile(tmp_path / "file", create_size=size) as file:
        unwritten = [(at, at + step) for at in range(0, size, step)]
        settling = Settling(file, size, unwritten, read_again=read_again)
        for at in range(0, size, step):
            file.write(at, b"x" * step)
            settling.done(at)
        assert settling.finish().sha256 == hashlib.sha256(b"x" * size).hexdigest()
        settling.close()
    if not _lets_go(tmp_path):
        pytest.skip("this file system keeps what it is told to let go of")
    assert (_resident(tmp_path / "file") > size // 2) is read_again


def _lets_go(folder: Path) -> bool:
    with PatchFile(folder / "other", create_size=CHUNK) as file:
        file.write(0, bytes(CHUNK))
        file.sync()
        file.let_go(CHUNK)
    return _resident(folder / "other") == 0


def _resident(path: Path) -> int:
    """Return how many bytes of a file are in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = (ctypes.c_ubyte * (len(mapped) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        try:
            where = ctypes.c_void_p(ctypes.addressof(start))
            assert libc.mincore(where, ctypes.c_size_t(len(mapped)), pages) == 0
        finally:
            del start
    return mmap.PAGESIZE * sum(page & 1 for page in pages)
