"""What every source promises, whatever stands behind it."""

from __future__ import annotations

import hashlib

import pytest
from places import CONTENTS

from pissa_core.errors import ShardTruncated


def test_lists_every_file_with_its_size(source):
    assert {path: info.size for path, info in source.files().items()} == {
        path: len(content) for path, content in CONTENTS.items()
    }


def test_checksums_are_right_where_they_are_given(source):
    for path, info in source.files().items():
        assert info.sha256 in (None, hashlib.sha256(CONTENTS[path]).hexdigest())


@pytest.mark.parametrize("path", sorted(CONTENTS))
def test_reads_whole_files(source, path):
    assert source.read(path) == CONTENTS[path]


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (5, 300), (16000, 16384)])
def test_reads_ranges(source, start, stop):
    assert (
        source.read("model.safetensors", start, stop) == (CONTENTS["model.safetensors"][start:stop])
    )


def test_fills_a_buffer(source):
    buffer = bytearray(100)
    source.read_into("model.safetensors", 250, memoryview(buffer))
    assert buffer == CONTENTS["model.safetensors"][250:350]


@pytest.mark.parametrize(("start", "stop"), [(0, 16384), (7, 16000), (300, 300)])
def test_streams_ranges(source, start, stop):
    streamed = b"".join(source.stream("model.safetensors", start, stop))
    assert streamed == CONTENTS["model.safetensors"][start:stop]


def test_streaming_past_the_end_names_the_file(source):
    with pytest.raises(ShardTruncated, match=r"model\.safetensors"):
        list(source.stream("model.safetensors", 16000, 17000))


def test_reading_past_the_end_names_the_file(source):
    with pytest.raises(ShardTruncated, match=r"model\.safetensors"):
        source.read("model.safetensors", 16000, 17000)


@pytest.mark.parametrize("path", sorted(CONTENTS))
def test_fetches_a_private_copy(source, tmp_path, path):
    source.fetch(path, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == CONTENTS[path]
    assert (tmp_path / "copy").stat().st_nlink == 1
    assert not (tmp_path / "copy").is_symlink()


def test_patching_the_copy_leaves_the_source_alone(source, tmp_path):
    source.fetch("model.safetensors", tmp_path / "copy")
    with (tmp_path / "copy").open("r+b") as copy:
        copy.write(b"patched")
    assert source.read("model.safetensors") == CONTENTS["model.safetensors"]


def test_holes_may_hold_anything_and_the_rest_is_the_source(source, tmp_path):
    holes = [(100, 200), (150, 300), (16000, 16384)]
    source.fetch("model.safetensors", tmp_path / "copy", holes=holes)
    copy, original = (tmp_path / "copy").read_bytes(), CONTENTS["model.safetensors"]
    assert len(copy) == len(original)
    assert copy[:100] == original[:100]
    assert copy[300:16000] == original[300:16000]


def test_the_same_files_have_the_same_fingerprint_and_others_another(make_source):
    first = make_source(CONTENTS)
    assert first.fingerprint == first.fingerprint
    changed = make_source({**CONTENTS, "config.json": b"{}"})
    assert changed.fingerprint != first.fingerprint
