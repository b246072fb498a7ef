"""Overwriting on the Hub: the branch ends with the result and nothing else, whatever was there."""

from __future__ import annotations

import pytest
from hub.faults import Fault
from hub_tools import IN, OUT
from places import CONTENTS, contents_of, publication, seal_in

from pissa_core.adapters.memory import MemorySource
from pissa_core.engine import convert
from pissa_core.errors import OutputExists, TokenInvalid
from pissa_core.events import Publishing
from pissa_core.runtime import Runtime
from pissa_core.spec import parse_config

LOCAL = MemorySource({})
RESULT = {
    "config.json",
    "sub/folder/notes.txt",
    "model.safetensors",
    "init/adapter.bin",
    "manifest.json",
}


def test_a_file_that_another_branch_has_already_is_published_all_the_same(hub, open_hub_sink):
    repo = hub.create_repo(OUT, files={"config.json": CONTENTS["config.json"]})
    repo.branches["r16"] = repo.branches["main"]
    repo.commit({"config.json": b"of another result"}, branch="r16")
    sink = open_hub_sink(f"{OUT}@r16", hub.create_token("somebody"), overwrite=True)
    sink.check(LOCAL)
    seal_in(sink)
    sink.publish(publication())
    assert contents_of(hub, OUT, "r16").keys() == RESULT
    assert contents_of(hub, OUT, "r16")["config.json"] == CONTENTS["config.json"]


@pytest.mark.parametrize("later", [b"edited meanwhile", None])
def test_what_changes_on_the_branch_while_work_is_staged_is_overwritten(hub, open_hub_sink, later):
    repo = hub.create_repo(OUT, files={"config.json": CONTENTS["config.json"]})
    sink = open_hub_sink(OUT, hub.create_token("somebody"), overwrite=True)
    sink.check(LOCAL)
    seal_in(sink)
    repo.commit({"config.json": later})
    sink.publish(publication())
    assert contents_of(hub, OUT).keys() == RESULT
    assert contents_of(hub, OUT)["config.json"] == CONTENTS["config.json"]


def test_what_the_client_would_not_write_is_overwritten_too(hub, open_hub_sink):
    hub.create_repo(OUT, files={".cache/huggingface/download/x.lock": b"", "sub/.cache/y": b"y"})
    sink = open_hub_sink(OUT, hub.create_token("somebody"), overwrite=True)
    sink.check(LOCAL)
    seal_in(sink)
    sink.publish(publication())
    assert contents_of(hub, OUT).keys() == RESULT


def test_an_older_result_with_the_same_marker_is_not_taken_for_ours(hub, open_hub_sink):
    token = hub.create_token("somebody")
    older = open_hub_sink(OUT, token)
    seal_in(older)
    older.publish(publication())
    older.discard()
    hub.repos[OUT].commit({"config.json": b"edited since"})
    # Killed between the announcement and the commit it announces.
    hub.faults.add(Fault("/commit/main$", "POST", status=401))
    sink = open_hub_sink(OUT, token, overwrite=True)
    seal_in(sink)
    with pytest.raises(TokenInvalid):
        sink.publish(publication())
    again = open_hub_sink(OUT, token, overwrite=True)
    assert again.published() is None
    again.publish(publication())
    assert again.published() is not None
    assert contents_of(hub, OUT)["config.json"] == CONTENTS["config.json"]


def test_a_result_that_is_there_already_is_published_without_a_commit(hub, open_hub_sink):
    token = hub.create_token("somebody")
    for _ in range(2):
        sink = open_hub_sink(OUT, token, overwrite=True)
        seal_in(sink)
        sink.publish(publication())
        assert sink.published() == contents_of(hub, OUT)["manifest.json"]
        assert sink.ref == f"hf://{OUT}@{hub.repos[OUT].branches['main']}"
        sink.discard()
    assert len(hub.repos[OUT].history("main")) == 2  # the repo's first, and ours


def test_what_is_in_the_way_at_the_end_can_be_moved_and_nothing_is_sent_twice(
    hub, open_hub, open_hub_sink, somebodys_token
):
    source = open_hub(IN, somebodys_token)
    with pytest.raises(OutputExists, match="filled by something else"):
        convert_and(open_hub_sink(OUT, somebodys_token), source, at_the_end=lambda: fill(hub))
    assert contents_of(hub, OUT) == {"theirs.txt": b"somebody else's"}
    sent = dict(hub.uploads.finished)
    hub.repos[OUT].commit({"theirs.txt": None})
    convert_and(open_hub_sink(OUT, somebodys_token), source, at_the_end=lambda: None)
    assert "pissa_manifest.json" in contents_of(hub, OUT)
    assert {oid: hub.uploads.finished[oid] for oid in sent} == sent


def fill(hub):
    hub.repos[OUT].commit({"theirs.txt": b"somebody else's"})


def convert_and(sink, source, *, at_the_end):
    for event in convert(source, sink, parse_config({"rank": 2}), Runtime("cpu", slots=1)):
        if isinstance(event, Publishing):
            at_the_end()
