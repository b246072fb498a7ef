"""The Hub misbehaves while a result is made: the same bytes in the end, or nothing and a code."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub.faults import Fault
from hub.server import running
from hub.state import Hub
from hub_tools import IN, OUT, run, shards_of, shown
from places import contents_of, publication, seal_in

from pissa_core.adapters.hub import HubClient, HubSink, HubSource, Pause
from pissa_core.errors import (
    DiskFull,
    DownloadCorrupt,
    HubUnavailable,
    NoWriteAccess,
    OutputExists,
    RateLimited,
    TokenInvalid,
)
from pissa_core.refs import HubRef

STAGING = "/commit/pissa-staging-d1$"
FINAL = "/commit/main$"


@pytest.fixture(scope="module")
def undisturbed(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    with running(Hub()) as hub:
        hub.create_repo(IN, llama_folder)
        client = HubClient(token=hub.create_token("somebody"), endpoint=hub.endpoint)
        source = HubSource(HubRef(IN), client=client)
        scratch = tmp_path_factory.mktemp("scratch")
        run(source, HubSink(HubRef(OUT), digest="d1", scratch=scratch, client=client))
        return shown(hub)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("/whoami-v2$", status=503),
        Fault("/repos/create$", "POST", status=502),
        Fault("/repos/create$", "POST", status=504, served=True),
        Fault("/branch/", "POST", drop=True, served=True),
        Fault("/preupload/", "POST", status=429, headers={"Retry-After": "1"}),
        Fault("/preupload/", "POST", times=2, status=500),
        Fault("/objects/batch$", "POST", drop=True),
        Fault("/uploads/", "PUT", cut_after=2000),
        Fault("/uploads/", "PUT", status=503),
        Fault("/uploads/", "PUT", corrupt_at=100),
        Fault("/uploads/", "PUT", skip=1, times=3, drip=2000, drip_s=0.02),
        Fault("/verify$", "POST", status=500),
        Fault(STAGING, "POST", status=429, headers={"Retry-After": "1"}),
        Fault(STAGING, "POST", status=503),
        Fault(STAGING, "POST", times=2, status=504, served=True),
        Fault(STAGING, "POST", drop=True, served=True),
        Fault("/revision/pissa-staging-d1$", skip=4, times=2, status=502),
        Fault("/blobs/", skip=4, cut_after=100),
        Fault("/blobs/", skip=6, cut_after=100),
        Fault("/blobs/", skip=4, drip=2000, drip_s=0.02),
        Fault("/blobs/", skip=4, times=2, status=503),
        Fault("/blobs/", skip=4, status=429, headers={"Retry-After": "1"}),
        Fault(FINAL, "POST", times=2, status=502),
        Fault(FINAL, "POST", status=504, served=True),
        Fault(FINAL, "POST", drop=True, served=True),
        Fault(FINAL, "POST", stall_s=0.3),
        Fault("/validate-yaml$", "POST", status=503),
        Fault("/branch/pissa-staging-d1$", "DELETE", status=504, served=True),
    ],
    ids=lambda fault: f"{fault.method}-{fault.path.strip('$/^')}-{fault.status or 'cut'}",
)
def test_what_passes_leaves_no_trace(
    hub, open_hub, open_hub_sink, somebodys_token, undisturbed, fault
):
    source = open_hub(IN, somebodys_token)
    sink = open_hub_sink(OUT, somebodys_token)
    hub.faults.add(fault)
    run(source, sink)
    assert fault.times == 0
    assert shown(hub) == undisturbed
    assert list(hub.repos[OUT].branches) == ["main"]
    assert len(hub.repos[OUT].history("main")) == 2
    assert set(hub.uploads.finished.values()) == {1}


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault("/commit/", "POST", times=10**6, status=503), HubUnavailable),
        (Fault("/uploads/", "PUT", times=10**6, status=400), HubUnavailable),
        (Fault("/preupload/", "POST", times=10**6, skip=2, status=402), DiskFull),
        (Fault("/commit/", "POST", times=10**6, status=507), DiskFull),
        (Fault("/blobs/", times=10**6, skip=4, corrupt_at=100), DownloadCorrupt),
        (Fault("/commit/", "POST", times=10**6, skip=1, status=403), NoWriteAccess),
        (
            Fault(FINAL, "POST", times=10**6, status=429, headers={"Retry-After": "9999"}),
            RateLimited,
        ),
        (Fault(FINAL, "POST", times=10**6, status=500), HubUnavailable),
    ],
    ids=lambda given: given.code if isinstance(given, type) else given.path.strip("$/^"),
)
def test_what_does_not_pass_shows_nothing_and_is_resumed(
    hub, open_hub, open_hub_sink, somebodys_token, undisturbed, fault, error
):
    hub.faults.add(fault)
    with pytest.raises(error) as caught:
        run(open_hub(IN, somebodys_token), open_hub_sink(OUT, somebodys_token))
    assert caught.value.hint
    assert contents_of(hub, OUT) == {}
    hub.faults.clear()
    run(open_hub(IN, somebodys_token), open_hub_sink(OUT, somebodys_token))
    assert shown(hub) == undisturbed
    assert set(hub.uploads.finished.values()) == {1}


@pytest.mark.parametrize("path", ["/preupload/", STAGING, FINAL])
def test_a_token_revoked_midway(hub, open_hub, open_hub_sink, somebodys_token, undisturbed, path):
    def revoke(name: str) -> None:
        hub.tokens[name].valid = False

    hub.faults.add(Fault(path, "POST", skip=1 if path != FINAL else 0, run=revoke))
    with pytest.raises(TokenInvalid, match="revoked"):
        run(open_hub(IN, somebodys_token), open_hub_sink(OUT, somebodys_token))
    assert contents_of(hub, OUT) == {}
    token = hub.create_token("somebody")
    run(open_hub(IN, token), open_hub_sink(OUT, token))
    assert shown(hub) == undisturbed


def test_pauses_that_the_hub_asks_for_are_told(hub, open_hub_sink):
    told: list[Pause | None] = []
    token = hub.create_token("somebody")
    sink = open_hub_sink(OUT, token, on_wait=told.append)
    hub.faults.add(Fault("/commit/", "POST", skip=1, status=429, headers={"Retry-After": "1"}))
    hub.faults.add(Fault("/uploads/", "PUT", status=503, headers={"Retry-After": "1"}))
    seal_in(sink)
    sink.publish(publication())
    pauses = [pause for pause in told if pause is not None]
    assert [(pause.error.code, pause.seconds) for pause in pauses] == [
        ("hub_unavailable", 1),
        ("rate_limited", 1),
    ]
    assert told[1::2] == [None, None]


def test_two_workers_seal_at_once_and_both_shards_are_there(hub, open_hub_sink, open_hub):
    """Each names the other's commit's parent, so one must look again."""
    token = hub.create_token("somebody")
    slow = open_hub_sink(OUT, token)

    def get_ahead(name: str) -> None:
        hub.repos[OUT].commit({"staged/other/seal.json": b"{}"}, branch="pissa-staging-d1")

    hub.faults.add(Fault(STAGING, "POST", run=get_ahead))
    seal_in(slow)
    assert slow.seal_of("model.safetensors") is not None
    assert "staged/other/seal.json" in hub.repos[OUT].resolve("pissa-staging-d1").files


def test_somebody_elses_commit_before_ours_is_not_written_over(hub, open_hub_sink):
    token = hub.create_token("somebody")
    sink = open_hub_sink(OUT, token)
    seal_in(sink)

    def get_ahead(name: str) -> None:
        hub.repos[OUT].commit({"other.txt": b"somebody else's"})

    hub.faults.add(Fault(FINAL, "POST", run=get_ahead))
    with pytest.raises(OutputExists, match="filled by something else"):
        sink.publish(publication())
    assert contents_of(hub, OUT) == {"other.txt": b"somebody else's"}


def test_a_shard_that_moved_under_us_is_not_published(hub, open_hub, open_hub_sink, tmp_path):
    """What a source's commit held is what is published, whatever its branch has become."""
    repo = hub.create_repo("someone/moving", files={"config.json": b"old"})
    token = hub.create_token("somebody")
    source = open_hub("someone/moving", token)
    sink = open_hub_sink(OUT, token)
    seal_in(sink)
    repo.commit({"config.json": b"new"})
    sink.publish(publication(source=source, copies=("config.json",)))
    assert contents_of(hub, OUT)["config.json"] == b"old"
    assert shards_of(source) == []


def test_what_the_hub_will_not_copy_is_sent_and_the_rest_not_again(hub, open_hub, open_hub_sink):
    hub.cross_repo = True
    large = bytes(range(256)) * (11 << 12)
    hub.create_repo(IN, files={"config.json": b"{}", "sub/folder/notes.txt": large})
    token, assembled = hub.create_token("somebody"), []

    def adapter():
        assembled.append("once")
        yield bytes(2 << 20)

    hub.faults.add(Fault("/lfs-files/duplicate$", "POST", status=404))
    source, sink = open_hub(IN, token), open_hub_sink(OUT, token)
    seal_in(sink)
    sink.publish(publication(source=source, streams={"init/adapter.safetensors": adapter}))
    contents = contents_of(hub, OUT)
    assert contents["sub/folder/notes.txt"] == large
    assert contents["init/adapter.safetensors"] == bytes(2 << 20)
    assert assembled == ["once"]
    assert set(hub.uploads.finished.values()) == {1}
