"""The checksum that follows a file being patched is that of the file as it ends up."""

from __future__ import annotations

import hashlib
import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from pissa_core.openfile import CHUNK
from pissa_core.settling import Settling
from pissa_core.tensorfile import PatchFile


@pytest.mark.parametrize("size", [0, 1, 4000, CHUNK + 5, 3 * CHUNK])
@pytest.mark.parametrize("seed", range(3))
def test_ranges_in_any_order_from_any_thread(size, seed, tmp_path):
    chance = random.Random(seed)
    path = tmp_path / "file"
    path.write_bytes(b"\xff" * size)
    cuts = sorted({0, size, *(chance.randrange(size + 1) for _ in range(9))})
    ranges = [pair for pair in itertools.pairwise(cuts) if chance.random() < 0.7]
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


def test_a_file_that_ends_too_soon_is_an_error(tmp_path):
    (tmp_path / "file").write_bytes(b"short")
    with PatchFile(tmp_path / "file") as file:
        settling = Settling(file, 100, [])
        with pytest.raises(EOFError):
            settling.finish()
        settling.close()
