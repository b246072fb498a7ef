"""What a dead attempt left is checked and taken up; what it lost is done again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import xxhash
from conversions import checksums, convert_to, course_of, header_of

from pissa_core.adapters.memory import MemorySink, MemorySource
from pissa_core.engine import convert
from pissa_core.events import MatrixDone, ShardStarted
from pissa_core.journal import boot_id
from pissa_core.runtime import Runtime
from pissa_core.spec import parse_config


@pytest.mark.parametrize("stop_after", [1, 2, 5, 9, 14])
@pytest.mark.parametrize("checkpoint", ["llama", "sharded"])
def test_stopped_anywhere_and_run_again_gives_the_same_bytes(
    request, tmp_path, checkpoint, stop_after
):
    model = request.getfixturevalue(checkpoint)
    convert_to(model, tmp_path / "out")
    undisturbed = checksums(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "undisturbed")

    course = course_of(model, tmp_path / "out", slots=1)
    seen = [next(course) for _ in range(stop_after)]
    course.close()
    assert not (tmp_path / "out").exists()
    done = {event.row["tensor"] for event in seen if isinstance(event, MatrixDone)}
    again = list(course_of(model, tmp_path / "out", slots=1))
    fresh = {e.row["tensor"] for e in again if isinstance(e, MatrixDone) and not e.resumed}
    assert not fresh & done
    assert checksums(tmp_path / "out") == undisturbed
    assert not list(tmp_path.glob(".out*"))


def half_done(model: Path, tmp_path: Path) -> Path:
    """Stop a conversion after three matrices; return the scratch folder it leaves."""
    course = course_of(model, tmp_path / "out", slots=1)
    while not isinstance(next(course), ShardStarted):
        pass
    for _ in range(3):
        next(course)
    course.close()
    (scratch,) = tmp_path.glob(".out.pissa-staging-*/work/*/*")
    return scratch


@pytest.mark.parametrize(
    "damage", ["factors", "residual", "header", "cut", "journal", "noise", "shard", "part"]
)
def test_a_damaged_scratch_is_noticed_by_its_checksums(llama, tmp_path, damage):
    convert_to(llama, tmp_path / "out")
    undisturbed = checksums(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "undisturbed")
    scratch = half_done(llama, tmp_path)
    finished = [json.loads(line) for line in (scratch / "journal").read_text().split("\n") if line]
    first = next(line["done"] for line in finished if "done" in line)
    shard = bytearray((scratch / "shard").read_bytes())
    part = bytearray((scratch / "part").read_bytes())
    start = tensor_start(scratch / "shard", first)
    if damage == "residual":
        shard[start + 5] ^= 1
    if damage == "header":
        shard[20] ^= 1
    if damage == "factors":
        part[len(header_of(scratch / "part")) + 3] ^= 1
    if damage == "cut":
        del shard[-10:]
    if damage == "journal":
        journal = (scratch / "journal").read_bytes()
        (scratch / "journal").write_bytes(journal[:-20])
    if damage == "noise":
        with (scratch / "journal").open("ab") as file:
            file.write(b"\xff\x00" * 30)
    (scratch / "shard").write_bytes(shard)
    (scratch / "part").write_bytes(part)
    if damage in ("shard", "part"):
        (scratch / damage).unlink()
    convert_to(llama, tmp_path / "out")
    assert checksums(tmp_path / "out") == undisturbed


def test_what_a_dead_attempt_had_copied_is_copied_again(llama, tmp_path, monkeypatch):
    def no_clone(*_: object) -> None:
        raise OSError("no clones here")

    monkeypatch.setattr("pissa_core.adapters.disk.fcntl.ioctl", no_clone)
    convert_to(llama, tmp_path / "out")
    undisturbed = checksums(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "undisturbed")
    scratch = half_done(llama, tmp_path)
    start = tensor_start(scratch / "shard", "model.embed_tokens.weight")
    with (scratch / "shard").open("r+b") as shard:
        shard.seek(start)
        shard.write(b"what a crash of the machine made of it")
    again = list(course_of(llama, tmp_path / "out"))
    assert sum(e.resumed for e in again if isinstance(e, MatrixDone)) == 3
    assert checksums(tmp_path / "out") == undisturbed


def test_a_file_system_that_clones_has_nothing_copied(llama, tmp_path, monkeypatch):
    convert_to(llama, tmp_path / "out")
    cloned: list[int] = []

    def clone(copy: int, request: int, source: int) -> None:
        cloned.append(os.pwrite(copy, os.pread(source, os.fstat(source).st_size, 0), 0))

    def never(*_: object) -> None:
        raise AssertionError("something was copied")

    monkeypatch.setattr("pissa_core.adapters.disk.fcntl.ioctl", clone)
    monkeypatch.setattr("pissa_core.workbench.Workbench._copy_from_source", never)
    convert_to(llama, tmp_path / "clone")
    assert cloned
    for name in ("model.safetensors", "pissa_init/adapter_model.safetensors"):
        assert (tmp_path / "clone" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def tensor_start(path: Path, name: str) -> int:
    header = header_of(path)
    return len(header) + json.loads(header[8:])[name]["data_offsets"][0]


class Downloaded(MemorySource):
    """A source whose copy is its own original until patched, as a download is."""

    rereads = False
    reads: list[tuple[str, int]]

    def __init__(self, contents) -> None:
        super().__init__(contents)
        self.reads = []

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        self.reads.append((path, start))
        super().read_into(path, start, buffer)


def test_a_downloaded_shard_is_read_from_its_copy_and_only_what_was_torn_from_afar(llama):
    contents = {path.name: path.read_bytes() for path in llama.iterdir()}
    source, sink = Downloaded(contents), MemorySink()
    undisturbed = MemorySink()
    runtime = Runtime(device="cpu", slots=1)
    list(convert(Downloaded(contents), undisturbed, parse_config({}), runtime))

    course = convert(source, sink, parse_config({}), runtime)
    for event in course:
        if isinstance(event, MatrixDone):
            break
    course.close()
    assert source.reads == []
    torn = tear(sink)
    list(convert(source, sink, parse_config({}), runtime))
    assert source.reads == [("model.safetensors", torn)]
    assert sink.contents == undisturbed.contents


@pytest.mark.parametrize("what", ["header", "model.embed_tokens.weight", "model.norm.weight"])
def test_a_damaged_download_is_fetched_again(llama, what):
    contents = {path.name: path.read_bytes() for path in llama.iterdir()}
    source, sink, undisturbed = Downloaded(contents), MemorySink(), MemorySink()
    runtime = Runtime(device="cpu", slots=1)
    list(convert(Downloaded(contents), undisturbed, parse_config({}), runtime))
    course = convert(source, sink, parse_config({}), runtime)
    next(event for event in course if isinstance(event, MatrixDone))
    course.close()
    (scratch,) = (Path(folder.name) for folder in sink._scratch.values())
    with (scratch / "shard").open("r+b") as shard:
        shard.seek(20 if what == "header" else tensor_start(scratch / "shard", what))
        shard.write(b"!")
    again = list(convert(source, sink, parse_config({}), runtime))
    assert not any(event.resumed for event in again if isinstance(event, MatrixDone))
    assert sink.contents == undisturbed.contents


def test_the_scratch_of_a_version_that_copied_first_is_taken_up(llama, tmp_path):
    convert_to(llama, tmp_path / "out")
    undisturbed = checksums(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "undisturbed")
    scratch = half_done(llama, tmp_path)
    lines = (scratch / "journal").read_text().splitlines()
    done = {entry["done"] for entry in map(json.loads, filter(None, lines)) if "done" in entry}
    # What stays as it is was there from the start, and the journal's first line covered it.
    header = header_of(llama / "model.safetensors")
    table = json.loads(header[8:])
    content = (llama / "model.safetensors").read_bytes()
    digest = xxhash.xxh3_128()
    with (scratch / "shard").open("r+b") as shard:
        spans = [(0, len(header))]
        for name, entry in table.items():
            if "norm" in name or "embed" in name or name == "lm_head.weight":
                spans.append(tuple(len(header) + at for at in entry["data_offsets"]))
        for start, stop in sorted(spans):
            shard.seek(start)
            shard.write(content[start:stop])
            digest.update(content[start:stop])
    digest.update(header_of(scratch / "part"))
    lines[0] = json.dumps({"boot": boot_id(), "around": digest.hexdigest()})
    (scratch / "journal").write_text("\n".join(lines) + "\n")
    again = list(course_of(llama, tmp_path / "out"))
    assert {e.row["tensor"] for e in again if isinstance(e, MatrixDone) and e.resumed} == done
    assert checksums(tmp_path / "out") == undisturbed


def tear(sink: MemorySink) -> int:
    """Leave the scratch as a kill in the middle of a write would; return the torn offset."""
    (scratch,) = (Path(folder.name) for folder in sink._scratch.values())
    name = "model.layers.1.mlp.up_proj.weight"
    start = tensor_start(scratch / "shard", name)
    with (scratch / "shard").open("r+b") as shard:
        shard.seek(start)
        shard.write(b"half of a residual")
    with (scratch / "journal").open("a") as journal:
        journal.write(json.dumps({"begin": name}) + '\n{"done": "mod')
    return start


@pytest.mark.parametrize("boot", ["another boot's", None])
def test_after_a_crash_of_the_machine_no_range_counts_as_untouched(
    llama, tmp_path, monkeypatch, boot
):
    contents = {path.name: path.read_bytes() for path in llama.iterdir()}
    source, sink, runtime = Downloaded(contents), MemorySink(), Runtime(device="cpu", slots=1)
    boot_id = tmp_path / "boot_id"
    monkeypatch.setattr("pissa_core.journal._BOOT_ID", boot_id)
    if boot is not None:
        boot_id.write_text("the first boot's")
    course = convert(source, sink, parse_config({}), runtime)
    finished = next(event for event in course if isinstance(event, MatrixDone))
    course.close()
    if boot is not None:
        boot_id.write_text(boot)
    source.reads.clear()
    again = list(convert(source, sink, parse_config({}), runtime))
    fresh = [e.row for e in again if isinstance(e, MatrixDone) and not e.resumed]
    assert finished.row not in fresh
    assert len(source.reads) == len(fresh) == 13
