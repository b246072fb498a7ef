"""The local adapters where a real disk and real processes matter."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import publication, seal_attempt, seal_in

from pissa_core.adapters.disk import disk_errors, outside
from pissa_core.adapters.local import LocalSink, LocalSource
from pissa_core.errors import (
    Cancelled,
    DiskFull,
    FolderNotFound,
    NoWriteAccess,
    OutputExists,
    OutputInsideSource,
    OutputIsSource,
    OutsideLocalRoot,
    SourceChanged,
)

HOLD = """
import sys, time
from pathlib import Path
from pissa_core.adapters.local import LocalSink
with LocalSink(Path(sys.argv[1]), digest="d").attempt("model.safetensors") as attempt:
    (attempt.folder / "journal").write_text("from the child")
    print(attempt.folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "weights.bin").write_bytes(b"x" * 1000)
    return made


@pytest.fixture
def holder(tmp_path: Path):
    """A process that holds an attempt, and the folder it holds."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    held = Path(process.stdout.readline().strip())
    yield process, held
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_killed_process_leaves_scratch_to_adopt(tmp_path, holder):
    process, held = holder
    process.kill()
    process.wait()
    with LocalSink(tmp_path / "out", digest="d").attempt("model.safetensors") as attempt:
        assert attempt.folder == held
        assert (attempt.folder / "journal").read_text() == "from the child"


def test_a_stopped_process_keeps_its_scratch(tmp_path, holder):
    process, held = holder
    process.send_signal(signal.SIGSTOP)
    sink = LocalSink(tmp_path / "out", digest="d")
    with sink.attempt("model.safetensors") as attempt:
        assert attempt.folder != held
    sink.discard()
    assert (held / "journal").exists()


def test_an_attempt_discarded_under_its_feet_cannot_seal_and_leaves_nothing(tmp_path):
    sink = LocalSink(tmp_path / "out", digest="d")
    with sink.attempt("model.safetensors") as held:
        LocalSink(tmp_path / "out", digest="d").discard()
        with pytest.raises(Cancelled, match="discarded"):
            seal_attempt(held)
    assert list(tmp_path.iterdir()) == []


def test_another_digest_shares_nothing(tmp_path):
    seal_in(LocalSink(tmp_path / "out", digest="one"))
    assert LocalSink(tmp_path / "out", digest="two").seal_of("model.safetensors") is None


def test_a_sealed_file_that_was_altered_loses_its_seal(tmp_path):
    sink = LocalSink(tmp_path / "out", digest="d")
    seal_in(sink)
    (sealed,) = tmp_path.glob(".out.*/sealed/*/*/shard")
    content = bytearray(sealed.read_bytes())
    content[7] ^= 1
    sealed.write_bytes(content)
    assert sink.seal_of("model.safetensors") is None


def test_a_sealed_file_that_was_only_touched_keeps_it(tmp_path):
    sink = LocalSink(tmp_path / "out", digest="d")
    seal_in(sink)
    (sealed,) = tmp_path.glob(".out.*/sealed/*/*/shard")
    os.utime(sealed, (1, 1))
    assert sink.seal_of("model.safetensors") is not None


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FolderNotFound, match="does not exist"):
        LocalSource(tmp_path / "nowhere")


def test_a_file_is_no_folder(folder):
    with pytest.raises(FolderNotFound, match="is a file"):
        LocalSource(folder / "config.json")


def test_a_file_changed_while_open_is_noticed(folder):
    source = LocalSource(folder)
    (folder / "weights.bin").write_bytes(b"y" * 1001)
    with pytest.raises(SourceChanged, match=r"weights\.bin"):
        source.read("weights.bin")


def test_a_file_removed_while_open_is_noticed(folder):
    source = LocalSource(folder)
    (folder / "weights.bin").unlink()
    with pytest.raises(SourceChanged, match="has gone"):
        source.read("weights.bin")


def test_a_touched_file_gives_another_fingerprint(folder):
    before = LocalSource(folder).fingerprint
    os.utime(folder / "weights.bin", ns=(time.time_ns(), time.time_ns() + 10**9))
    assert LocalSource(folder).fingerprint != before


def test_symlinks_are_read_as_files_but_not_out_of_the_root(folder, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    assert LocalSource(folder).read("link") == b"secret"
    with pytest.raises(OutsideLocalRoot, match="link is a symlink"):
        LocalSource(folder, root=folder)


def test_a_fetched_symlink_is_a_file_of_its_own(folder, tmp_path):
    (folder / "link").symlink_to(folder / "weights.bin")
    LocalSource(folder).fetch("link", tmp_path / "copy")
    assert not (tmp_path / "copy").is_symlink()
    assert (tmp_path / "copy").stat().st_ino != (folder / "weights.bin").stat().st_ino


@pytest.mark.parametrize(
    ("output", "error"),
    [("model", OutputIsSource), ("model/out", OutputInsideSource), ("full", OutputExists)],
)
def test_outputs_that_are_refused(folder, tmp_path, output, error):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("here")
    with pytest.raises(error):
        LocalSink(tmp_path / output, digest="d").check(LocalSource(folder))


def test_an_empty_folder_is_accepted_and_filled(folder, tmp_path):
    (tmp_path / "out").mkdir()
    sink = LocalSink(tmp_path / "out", digest="d")
    sink.check(LocalSource(folder))
    seal_in(sink)
    sink.publish(publication())
    assert (tmp_path / "out" / "manifest.json").exists()


def test_a_file_where_the_output_should_go_is_refused(folder, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputExists):
        LocalSink(tmp_path / "out", digest="d").check(LocalSource(folder))


def test_a_place_below_a_file_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NoWriteAccess, match="file"):
        LocalSink(tmp_path / "file" / "out", digest="d").check(LocalSource(folder))


def test_what_staging_holds_counts_as_free(tmp_path):
    sink = LocalSink(tmp_path / "out", digest="d")
    with sink.attempt("model.safetensors") as attempt:
        (attempt.folder / "journal").write_bytes(os.urandom(64 << 20))
        taken = sink.free_bytes() - shutil.disk_usage(tmp_path).free
    assert taken >= 64 << 20


@pytest.mark.parametrize(
    ("holes", "expected"),
    [
        ([], [(0, 10)]),
        ([(0, 10)], []),
        ([(2, 4)], [(0, 2), (4, 10)]),
        ([(6, 8), (2, 4)], [(0, 2), (4, 6), (8, 10)]),
        ([(2, 6), (3, 4)], [(0, 2), (6, 10)]),
    ],
)
def test_outside_holes(holes, expected):
    assert list(outside(holes, 10)) == expected


def test_a_full_disk_is_said_so():
    with pytest.raises(DiskFull, match="full"), disk_errors(Path("/some/where")):
        raise OSError(errno.ENOSPC, "No space left on device")
