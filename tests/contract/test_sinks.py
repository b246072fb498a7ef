"""What every sink promises: staged out of sight, sealed once, visible all at once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from places import (
    CONTENTS,
    PART,
    SHARD,
    make_seal,
    publication,
    seal_attempt,
    seal_in,
)

from pissa_core.adapters.memory import MemorySource
from pissa_core.errors import OutputExists
from pissa_core.ports import FileInfo


def test_nothing_is_sealed_at_first(place):
    assert place.open().seal_of("model.safetensors") is None


def test_a_seal_is_found_again_with_its_rows(place):
    seal_in(place.open())
    assert place.open().seal_of("model.safetensors") == make_seal()


def test_sealed_parts_are_read_by_range(place):
    seal_in(place.open())
    assert place.open().read_part("model.safetensors", 3, 12) == PART[3:12]


def test_the_first_to_seal_wins(place):
    sink = place.open()
    with sink.attempt("model.safetensors") as slow:
        seal_in(place.open())
        seal_attempt(slow, shard=b"late", part=b"late")
    assert place.open().seal_of("model.safetensors") == make_seal()
    assert place.open().read_part("model.safetensors", 0, 4) == PART[:4]


def test_an_abandoned_attempt_is_taken_up(place):
    with place.open().attempt("model.safetensors") as attempt:
        (attempt.folder / "journal").write_text("half done")
    with place.open().attempt("model.safetensors") as attempt:
        assert (attempt.folder / "journal").read_text() == "half done"


def test_a_held_attempt_is_left_alone(place):
    with place.open().attempt("model.safetensors") as held:
        (held.folder / "journal").write_text("mine")
        with place.open().attempt("model.safetensors") as other:
            assert other.folder != held.folder
            assert not (other.folder / "journal").exists()
        assert (held.folder / "journal").read_text() == "mine"


def test_nothing_is_visible_until_published_and_then_everything(place):
    sink = place.open()
    seal_in(sink)
    assert place.visible() == {}
    sink.publish(publication())
    assert place.visible() == {
        "model.safetensors": SHARD,
        "config.json": CONTENTS["config.json"],
        "sub/folder/notes.txt": CONTENTS["sub/folder/notes.txt"],
        "init/adapter.bin": b"onetwo",
        "manifest.json": place.visible()["manifest.json"],
    }


def test_the_closing_files_are_told_every_checksum(place):
    seen: dict[str, FileInfo] = {}

    def closing(files):
        seen.update(files)
        return {"manifest.json": b"{}"}

    seal_in(place.open())
    place.open().publish(publication(closing=closing))
    for path, info in seen.items():
        content = place.visible()[path]
        assert info == FileInfo(len(content), hashlib.sha256(content).hexdigest())


def test_an_error_while_publishing_shows_nothing(place):
    def broken():
        yield b"begun"
        raise RuntimeError("the disk caught fire")

    seal_in(place.open())
    with pytest.raises(RuntimeError, match="caught fire"):
        place.open().publish(publication(streams={"init/adapter.bin": broken}))
    assert place.visible() == {}
    place.open().publish(publication())
    assert place.visible()["init/adapter.bin"] == b"onetwo"


def test_publishing_twice_changes_nothing(place):
    seal_in(place.open())
    place.open().publish(publication())
    marker = place.open().published()
    place.open().publish(publication(streams={}))
    assert place.open().published() == marker == place.visible()["manifest.json"]
    assert "init/adapter.bin" in place.visible()


def test_a_published_result_passes_the_check_again_and_somebody_elses_does_not(place):
    source = MemorySource(CONTENTS)
    seal_in(place.open())
    place.open().publish(publication())
    place.open().check(source)
    place.open().discard()
    with pytest.raises(OutputExists, match="not empty"):
        place.open().check(source)


def test_an_occupied_place_is_refused_before_and_at_the_end(place):
    seal_in(place.open())
    place.occupy()
    with pytest.raises(OutputExists, match="not empty"):
        place.open().check(MemorySource(CONTENTS))
    with pytest.raises(OutputExists, match="filled by something else"):
        place.open().publish(publication())
    assert list(place.visible()) == ["other.txt"]


def test_discarding_forgets_seals_or_keeps_them(place):
    seal_in(place.open())
    place.open().discard(keep_sealed=True)
    assert place.open().seal_of("model.safetensors") == make_seal()
    place.open().discard()
    assert place.open().seal_of("model.safetensors") is None


def test_discarding_leaves_what_is_published(place):
    seal_in(place.open())
    place.open().publish(publication())
    place.open().discard()
    assert place.visible()["model.safetensors"] == SHARD


def test_scratch_ends_with_its_attempt(place):
    with place.open().attempt("model.safetensors") as attempt:
        folder: Path = attempt.folder
        seal_attempt(attempt)
    assert not folder.exists()
