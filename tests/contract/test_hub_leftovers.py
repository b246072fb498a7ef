"""What an attempt on the Hub leaves behind, and what it asks the Hub for again and again."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest
from hub_tools import OUT
from places import make_seal, named_seal_in, publication, seal_in

from pissa_core.adapters.hub import sink as hub_sink
from pissa_core.adapters.hub.pending import Pending, Ready
from pissa_core.adapters.hub.staging import SCHEMA
from pissa_core.adapters.hub.sweeping import PREFIX
from pissa_core.adapters.ledger import Ledger
from pissa_core.adapters.local.scratch import (
    discard_result,
    discard_scratch,
    open_scratch,
    share,
)

SHARD = "model.safetensors"


def looks(hub, sink, shards: list[str]) -> int:
    """Publish these shards; return how often the staging branch was listed for it."""
    before = len(hub.requests(rf"/revision/{PREFIX}"))
    seals = sink.seals_of(shards)
    assert all(seals)

    def adapter():
        for seal in seals:
            yield sink.read_part(seal.shard, 0, seal.part_size)

    sink.publish(publication(shards=seals, streams={"init/adapter.bin": adapter}))
    return len(hub.requests(rf"/revision/{PREFIX}")) - before


def test_publishing_lists_what_is_staged_as_often_for_many_shards_as_for_one(hub, open_hub_sink):
    token, counts = hub.create_token("somebody"), []
    for digest, many in (("one", 1), ("eight", 8)):
        shards = [f"{digest}-{n}.safetensors" for n in range(many)]
        working = open_hub_sink(f"somebody/{digest}", token, digest)
        for shard in shards:
            named_seal_in(working, shard)
        fresh = open_hub_sink(f"somebody/{digest}", token, digest, machine="there")
        counts.append(looks(hub, fresh, shards))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("text", [{"schema": SCHEMA + 1}, {}, [], "no record at all"])
def test_a_seal_of_another_schema_is_none_and_its_shard_is_sealed_again(hub, open_hub_sink, text):
    sink = open_hub_sink(OUT, hub.create_token("somebody"))
    seal_in(sink)
    repo = hub.repos[OUT]
    (path,) = [name for name in repo.resolve(PREFIX + "d1").files if name.endswith("seal.json")]
    blob = repo.resolve(PREFIX + "d1").files[path].blob
    found = json.loads(blob.read(0, blob.size))
    assert found["schema"] == SCHEMA
    written = {**found, "schema": None, **text} if isinstance(text, dict) else text
    repo.commit({path: json.dumps(written).encode()}, branch=PREFIX + "d1")
    assert sink.seal_of(SHARD) is None
    assert sink.seals_of([SHARD]) == (None,)
    seal_in(sink)
    assert sink.seal_of(SHARD) == make_seal()


def leave_publishing(sink) -> Path:
    """Do as an attempt that is killed while it publishes."""
    shared = share(sink.publishing_folder)
    folder, lock = open_scratch(sink.publishing_folder)
    (folder / "adapter").write_bytes(bytes(5000))
    os.close(lock)
    os.close(shared)
    return folder


def test_what_a_killed_publisher_left_counts_and_makes_room_in_time(hub, open_hub_sink, tmp_path):
    sink = open_hub_sink(OUT, hub.create_token("somebody"))
    ledger = Ledger(tmp_path / "here", 10_000)
    with ledger.try_hold(6000, sink.publishing_folder, waited_s=0):
        left = leave_publishing(sink)
    assert ledger.try_hold(6000, None, waited_s=0) is None
    assert left.exists()
    assert ledger.try_hold(6000, None, waited_s=11) is None
    assert not left.exists()
    held = ledger.try_hold(6000, None, waited_s=11)
    assert held is not None
    ledger.release(held)


def test_what_a_living_publisher_holds_is_left_to_it(hub, open_hub_sink, tmp_path):
    sink = open_hub_sink(OUT, hub.create_token("somebody"))
    ledger = Ledger(tmp_path / "here", 10_000)
    with ledger.try_hold(6000, sink.publishing_folder, waited_s=0):
        leave_publishing(sink)
    with sink._publishing() as folder:
        (folder / "adapter").write_bytes(b"half of it")
        assert ledger.try_hold(6000, None, waited_s=11) is None
        assert (folder / "adapter").exists()
    ledger.sweep()
    assert not list((tmp_path / "here").glob("**/*"))


def test_publishing_again_removes_what_a_killed_attempt_left(hub, open_hub_sink, tmp_path):
    sink = open_hub_sink(OUT, hub.create_token("somebody"))
    left = leave_publishing(sink)
    seal_in(sink)
    sink.publish(publication())
    assert not left.exists()
    assert not list((tmp_path / "here").glob("**/*"))


def test_records_of_the_dead_go_with_the_result_and_those_of_the_living_stay(tmp_path):
    waiting = Pending(tmp_path / "d1" / ".sealing")
    with waiting.joined(Ready("living", (), {})) as record:
        dead = record.with_name("dead.ready")
        dead.write_text("{}")
        discard_result(tmp_path / "d1")
        assert record.exists()
        assert not dead.exists()
        dead.write_text("{}")
    discard_result(tmp_path / "d1")
    assert not list(tmp_path.iterdir())


def test_a_record_of_another_version_counts_for_nothing(tmp_path):
    waiting = Pending(tmp_path / "d1" / ".sealing")
    with waiting.joined(Ready("ours", (), {})) as ours, waiting.joined(Ready("x", (), {})) as other:
        for text in ('{"shard": "x"}', '{"schema": 2, "shard": "x"}', "[]", "", "\0"):
            other.write_text(text)
            assert waiting.beside(ours) == []
        assert other.exists()


def test_a_record_that_never_was_finished_goes_once_it_is_old(tmp_path):
    waiting = Pending(tmp_path / "d1" / ".sealing")
    with waiting.joined(Ready("living", (), {})) as record:
        fresh, old = (record.with_name(name) for name in (".fresh", ".old"))
        fresh.touch()
        old.touch()
        os.utime(old, (0, 0))
        waiting.tidy()
        assert fresh.exists()
        assert not old.exists()


@pytest.mark.parametrize("what", ["record", "lock"])
def test_a_seal_needs_no_room_for_its_record(hub, open_hub_sink, tmp_path, what):
    """On a full disk neither of both small files can be made; everything large is sent by then."""
    sink = open_hub_sink(OUT, hub.create_token("somebody"))
    folder = tmp_path / "here" / "d1" / ".sealing"
    folder.parent.mkdir(parents=True)
    if what == "record":
        folder.touch()
    else:
        (folder / "lock").mkdir(parents=True)
    named_seal_in(sink, "a")
    assert sink.seal_of("a") is not None


def test_a_publisher_that_ends_leaves_another_its_folder(hub, open_hub_sink):
    sink = open_hub_sink(OUT, hub.create_token("somebody"))
    with sink._publishing() as folder:
        with sink._publishing():
            pass
        assert discard_scratch(sink.publishing_folder)
        assert folder.exists()
    assert not sink.publishing_folder.exists()


def test_a_publisher_that_finds_no_room_holds_nothing(hub, open_hub_sink, monkeypatch):
    sink = open_hub_sink(OUT, hub.create_token("somebody"))

    def no_room(work: Path) -> None:
        raise OSError(errno.ENOSPC, "no room", str(work))

    monkeypatch.setattr(hub_sink, "open_scratch", no_room)
    with pytest.raises(OSError, match="no room"), sink._publishing():
        pass
    assert not sink.publishing_folder.exists()


@pytest.mark.parametrize("tidier", ["still holds it", "is done with it"])
def test_a_record_that_another_tidies_away_in_the_making_is_made_again(
    tmp_path, monkeypatch, tidier
):
    """Between the moments at which a file is made and locked it looks like one that was left."""
    waiting, real, met = Pending(tmp_path / "d1" / ".sealing"), fcntl.flock, []

    def tidied(fd: int, how: int) -> None:
        if not met:
            met.append(fd)
            Path(f"/proc/self/fd/{fd}").readlink().unlink()
            if tidier == "still holds it":
                raise BlockingIOError
        real(fd, how)

    with waiting.joined(Ready("living", (), {})) as other:
        monkeypatch.setattr(fcntl, "flock", tidied)
        with waiting.joined(Ready("tidied", (), {})):
            assert [ready.shard for ready in waiting.beside(other)] == ["tidied"]
    assert met
    assert not (tmp_path / "d1" / ".sealing").exists()
