"""The local adapters where a real disk and real processes matter."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import publication, seal_attempt, seal_in

from pissa_core.adapters import open_source
from pissa_core.adapters.disk import disk_errors, outside
from pissa_core.adapters.local import LocalSink, LocalSource
from pissa_core.adapters.local.scratch import discard_result, open_scratch, remove_scratch
from pissa_core.errors import (
    Cancelled,
    DiskFull,
    FolderNotFound,
    InvalidReference,
    NoReadAccess,
    NoWriteAccess,
    OutputExists,
    OutputInsideSource,
    OutputIsSource,
    OutsideLocalRoot,
    SourceChanged,
)
from pissa_core.refs import LocalRef

NOBODY = 65534

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


def test_a_file_with_several_names_counts_once(tmp_path):
    sink = LocalSink(tmp_path / "out", digest="d")
    with sink.attempt("model.safetensors") as attempt:
        (attempt.folder / "journal").write_bytes(os.urandom(8 << 20))
        before = sink.free_bytes() - shutil.disk_usage(tmp_path).free
        os.link(attempt.folder / "journal", attempt.folder / "again")
        after = sink.free_bytes() - shutil.disk_usage(tmp_path).free
    assert after < before + (4 << 20)


def test_room_is_looked_for_where_staging_lies(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    asked = []
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage(path))
    LocalSink(tmp_path / "out", digest="d").free_bytes()
    assert asked == [tmp_path]


def test_killed_before_the_record_of_a_seal_the_scratch_is_whole(tmp_path, monkeypatch):
    sink = LocalSink(tmp_path / "out", digest="d")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with sink.attempt("model.safetensors") as attempt, monkeypatch.context() as patched:
        (attempt.folder / "journal").write_text("all done")
        patched.setattr("pissa_core.adapters.local.scratch.create_once", killed)
        with pytest.raises(KeyboardInterrupt):
            seal_attempt(attempt)
    assert sink.seal_of("model.safetensors") is None
    with sink.attempt("model.safetensors") as attempt:
        kept = {path.name for path in attempt.folder.iterdir()}
        assert kept == {"lock", "journal", "shard", "part"}
        seal_attempt(attempt)
    assert sink.seal_of("model.safetensors") is not None


def test_scratch_is_never_adopted_while_it_is_being_removed(tmp_path, monkeypatch):
    sink = LocalSink(tmp_path / "out", digest="d")
    seen = []
    rmtree = shutil.rmtree

    def remove(folder: Path, **options: bool) -> None:
        # The worst order: the lock goes first, and another attempt looks around.
        (folder / "lock").unlink()
        with LocalSink(tmp_path / "out", digest="d").attempt("model.safetensors") as other:
            seen.append((other.folder / "journal").exists())
            monkeypatch.setattr(shutil, "rmtree", rmtree)
        rmtree(folder, **options)

    with sink.attempt("model.safetensors") as attempt:
        (attempt.folder / "journal").write_text("all done")
        monkeypatch.setattr(shutil, "rmtree", remove)
        seal_attempt(attempt)
    assert seen == [False]


def test_the_second_to_publish_the_same_result_has_published_it(tmp_path):
    slow, quick = (LocalSink(tmp_path / "out", digest="d") for _ in range(2))
    seal_in(quick)

    def overtaken():
        quick.publish(publication())
        yield b"onetwo"

    slow.publish(publication(streams={"init/adapter.bin": overtaken}))
    assert slow.published() == (tmp_path / "out" / "manifest.json").read_bytes()
    assert not list(tmp_path.glob(".out.*/tree-*"))


@pytest.mark.parametrize("when", ["before the links", "after the links"])
def test_what_is_discarded_while_it_is_published_does_not_appear(tmp_path, when):
    sink = LocalSink(tmp_path / "out", digest="d")
    seal_in(sink)

    def discarding():
        LocalSink(tmp_path / "out", digest="d").discard()
        yield b"onetwo"

    contents = publication(streams={"init/adapter.bin": discarding})
    if when == "before the links":
        sink.discard()
    with pytest.raises(Cancelled, match="discarded"):
        sink.publish(contents)
    assert list(tmp_path.iterdir()) == []


PUBLISH = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from places import publication
from pissa_core.adapters.local import LocalSink
def killed():
    yield b"begun"
    os.kill(os.getpid(), 9)
LocalSink(Path(sys.argv[1]), digest="d").publish(publication(streams={"big": killed}))
"""


def test_trees_of_killed_publications_do_not_pile_up(tmp_path):
    sink = LocalSink(tmp_path / "out", digest="d")
    seal_in(sink)
    for _ in range(2):
        here = str(Path(__file__).parent)
        subprocess.run([sys.executable, "-c", PUBLISH, str(tmp_path / "out"), here], check=False)
        assert len([path for path in tmp_path.glob(".out.*/tree-*") if path.is_dir()]) == 1
    sink.publish(publication())
    assert not list(tmp_path.glob(".out.*/tree-*"))


def test_folders_on_the_way_to_a_seal_are_durable(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("pissa_core.adapters.disk.sync_folder", synced.append)
    seal_in(LocalSink(tmp_path / "deep" / "out", digest="d"))
    (sealed,) = tmp_path.glob("deep/.out.*/sealed/*")
    assert {tmp_path, tmp_path / "deep", sealed.parent.parent, sealed.parent} <= set(synced)


@pytest.mark.parametrize("name", ["o" * 255, "ü" * 127, "with\nnewline and 'quotes' \U0001f600"])
def test_outputs_may_have_any_name_a_disk_takes(folder, tmp_path, name):
    sink = LocalSink(tmp_path / name, digest="d")
    sink.check(LocalSource(folder))
    seal_in(sink)
    sink.publish(publication())
    assert (tmp_path / name / "manifest.json").exists()


def test_shards_may_have_any_name_a_disk_takes(tmp_path):
    sink = LocalSink(tmp_path / "out", digest="d")
    for name in ("s" * 255, "\U0001f600" * 63, "a/" * 200 + "s"):
        assert sink.seal_of(name) is None
        with sink.attempt(name):
            pass


def test_a_name_too_long_is_refused_before_work(folder, tmp_path):
    with pytest.raises(NoWriteAccess, match="too long"):
        LocalSink(tmp_path / ("o" * 256), digest="d").check(LocalSource(folder))


def test_a_mount_point_is_refused_before_work(folder, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "out")
    with pytest.raises(NoWriteAccess, match="mount point") as caught:
        LocalSink(tmp_path / "out", digest="d").check(LocalSource(folder))
    assert str(tmp_path / "out" / "model") in caught.value.hint


@pytest.fixture
def commons() -> Iterator[Path]:
    """A folder of an ordinary user's, while this process is that user."""
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        (made / "model").mkdir()
        (made / "model" / "config.json").write_text("{}")
        (made / "closed" / "out").mkdir(parents=True)
        (made / "closed").chmod(0o555)
        root = os.geteuid() == 0
        if root:
            for path in (made, *made.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, 0)
        try:
            yield made
        finally:
            if root:
                os.setresuid(0, 0, 0)
            for path in (made / "closed", made / "model"):
                path.chmod(0o755)


def test_an_empty_folder_that_cannot_be_replaced_is_refused(commons):
    with pytest.raises(NoWriteAccess, match="nothing can be written"):
        LocalSink(commons / "closed" / "out", digest="d").check(LocalSource(commons / "model"))


def test_a_folder_that_may_not_be_read_is_said_so(commons):
    (commons / "model").chmod(0)
    for folder in (commons / "model", commons / "model" / "inner"):
        with pytest.raises(NoReadAccess, match=r"/(model|inner) may not be read"):
            LocalSource(folder)
    with pytest.raises(NoWriteAccess, match="cannot be written"):
        LocalSink(commons / "model" / "out", digest="d").check(LocalSource(commons / "closed"))


def test_a_part_of_a_model_that_may_not_be_read_is_not_passed_over(commons):
    (commons / "model" / "inner").mkdir(mode=0)
    with pytest.raises(NoReadAccess, match="inner may not be read"):
        LocalSource(commons / "model")


def test_staging_that_may_not_be_made_is_said_so(commons):
    with pytest.raises(NoWriteAccess, match="cannot be written"):
        seal_in(LocalSink(commons / "closed" / "out", digest="d"))


def test_a_circle_of_symlinks_is_no_folder(tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    # Which of the two depends on the version of Python, whose newer ones resolve a circle.
    with pytest.raises((InvalidReference, FolderNotFound), match="circle"):
        open_source(LocalRef(str(tmp_path / "circle")))


def test_a_path_no_disk_takes_is_a_missing_folder(tmp_path):
    with pytest.raises(FolderNotFound, match=r"does not exist \(file name too long\)"):
        LocalSource(tmp_path / ("x" * 300))


def test_a_file_that_changes_while_it_is_copied_is_noticed(folder, tmp_path, monkeypatch):
    source = LocalSource(folder)

    def copy_meanwhile(fd: int, destination: Path, holes: object) -> None:
        (folder / "weights.bin").write_bytes(b"y" * 1000)
        destination.write_bytes(b"half old, half new")

    monkeypatch.setattr("pissa_core.adapters.local.source.private_copy", copy_meanwhile)
    with pytest.raises(SourceChanged, match=r"weights\.bin .* was changed while"):
        source.fetch("weights.bin", tmp_path / "copy")


def test_a_file_cut_short_while_it_is_copied_is_a_changed_source(folder, tmp_path, monkeypatch):
    source = LocalSource(folder)

    def cut_short(*_: object) -> None:
        raise EOFError("the file ends at byte 3")

    monkeypatch.setattr("pissa_core.adapters.local.source.private_copy", cut_short)
    with pytest.raises(SourceChanged, match=r"weights\.bin"):
        source.fetch("weights.bin", tmp_path / "copy")


@pytest.mark.parametrize("answer", [errno.EPERM, errno.EXDEV, errno.EIO, None])
def test_a_disk_that_copies_nothing_by_itself_is_served_by_bytes(
    folder, tmp_path, monkeypatch, answer
):
    def refuse(*_: object) -> int:
        if answer is None:
            return 0
        raise OSError(answer, os.strerror(answer))

    def no_clone(*_: object) -> None:
        raise OSError(answer or errno.EOPNOTSUPP, "no clones here")

    monkeypatch.setattr("pissa_core.adapters.disk.fcntl.ioctl", no_clone)
    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    content = os.urandom(100_000)
    (folder / "weights.bin").write_bytes(content)
    LocalSource(folder).fetch("weights.bin", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content


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


def test_scratch_is_opened_while_others_tidy_up(tmp_path):
    """Another job's discard takes a folder in the making for one that was left."""
    result, opened = tmp_path / "result", 0
    done = threading.Event()

    def tidy_up() -> None:
        while not done.is_set():
            discard_result(result)

    others = [threading.Thread(target=tidy_up) for _ in range(2)]
    for other in others:
        other.start()
    try:
        for _ in range(100):
            folder, lock = open_scratch(result / "shard")
            opened += folder.is_dir() and (folder / "lock").exists()
            remove_scratch(folder)
            os.close(lock)
    finally:
        done.set()
        for other in others:
            other.join()
    assert opened == 100
    discard_result(result)
    assert not result.exists()
