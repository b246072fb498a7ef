"""Looking for old scratch does not trip over folders that others make and remove meanwhile."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest

from pissa_core.adapters.local.scratch import below, discard_old


def test_what_lies_below_is_listed_by_level(tmp_path: Path) -> None:
    for name in ("b/x/1", "a/y/2", "a/.z/3"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file").write_text("")
    assert [path.name for path in below(tmp_path, 3)] == ["3", "2", "1"]
    assert below(tmp_path / "absent", 2) == []


def test_old_scratch_goes_and_young_stays(tmp_path: Path) -> None:
    old, young = tmp_path / "result" / "shard" / "old", tmp_path / "result" / "shard" / "young"
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    discard_old(tmp_path, timedelta(days=1))
    assert not old.exists()
    assert young.is_dir()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_folder_that_comes_and_goes_is_passed_over(tmp_path: Path, depth: int) -> None:
    folder = Path(tmp_path, *("result" for _ in range(depth)))
    done = threading.Event()

    def tidy() -> None:
        while not done.is_set():
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):
                folder.rmdir()

    others = threading.Thread(target=tidy)
    others.start()
    try:
        for _ in range(3000):
            discard_old(tmp_path, timedelta(days=1))
    finally:
        done.set()
        others.join()
