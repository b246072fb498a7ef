"""What only a Hub can do wrong, over real HTTP with the real client: each error, each recovery."""

from __future__ import annotations

import hashlib
import os
import socket
import threading

import pytest
from hub.blobs import Bytes
from hub.faults import Fault
from huggingface_hub import constants

from pissa_core.adapters import hub as hub_adapter
from pissa_core.adapters import open_source
from pissa_core.adapters.hub import HubClient, HubSource, Patience
from pissa_core.errors import (
    AccessError,
    DownloadCorrupt,
    FolderNotFound,
    GatedRepo,
    HubUnavailable,
    NoReadAccess,
    RateLimited,
    RepoNotFound,
    RevisionNotFound,
    SourceChanged,
    TokenInvalid,
)
from pissa_core.refs import HubRef

SHARD = os.urandom(3 << 20)
FILES = {
    "config.json": b'{"architectures": ["Nothing"]}',
    "model.safetensors": SHARD,
    "inner/config.json": b"{}",
    "inner/model.safetensors": b"inner weights",
}
ID = "someone/model"


@pytest.fixture
def repo(hub):
    return hub.create_repo(ID, files=FILES)


# --- what is read -----------------------------------------------------------------------------


def test_a_branch_is_pinned_to_the_commit_it_has_when_opened(hub, repo, open_hub):
    pinned = repo.branches["main"]
    source = open_hub(ID)
    repo.commit({"config.json": b"changed"})
    assert (source.commit, source.ref) == (pinned, f"hf://{ID}@{pinned}")
    assert source.read("config.json") == FILES["config.json"]
    data = hub.requests(f"^/{ID}/resolve/")
    assert data
    assert all(seen.path.startswith(f"/{ID}/resolve/{pinned}/") for seen in data)


@pytest.mark.parametrize("revision", ["v1", "refs%2Fheads%2Fside", "side", None])
def test_tags_branches_and_hashes_resolve(repo, open_hub, revision):
    repo.tags["v1"] = repo.branches["side"] = repo.branches["main"]
    repo.commit({"config.json": b"on main"})
    commit = repo.tags["v1"]
    source = open_hub(f"hf://{ID}@{revision or commit}")
    assert source.commit == commit
    assert source.read("config.json") == FILES["config.json"]


def test_a_subfolder_is_a_checkpoint_of_its_own(repo, open_hub, tmp_path):
    source = open_hub(f"hf://{ID}/inner")
    assert set(source.files()) == {"config.json", "model.safetensors"}
    assert source.ref == f"hf://{ID}@{source.commit}/inner"
    source.fetch("model.safetensors", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == FILES["inner/model.safetensors"]


def test_large_files_come_with_the_checksum_the_hub_promises(repo, open_hub):
    files = open_hub(ID).files()
    assert files["model.safetensors"].sha256 == hashlib.sha256(SHARD).hexdigest()
    assert files["config.json"].sha256 is None


def test_a_range_costs_its_own_bytes(hub, repo, open_hub):
    source = open_hub(ID)
    before = hub.sent_bytes()
    assert source.read("model.safetensors", 1000, 2000) == SHARD[1000:2000]
    assert hub.sent_bytes() - before < 1100


def test_paths_with_odd_names_are_read(hub, open_hub):
    files = {"weights of süß #1?.safetensors": b"odd", "a%2Fb+c.txt": b"encoded"}
    hub.create_repo(ID, files=files)
    source = open_hub(ID)
    assert {path: source.read(path) for path in files} == files


def test_a_repo_with_very_many_files_is_listed_page_by_page(hub, open_hub, monkeypatch):
    monkeypatch.setattr("pissa_core.adapters.hub.client._LISTED", 20)
    hub.page = 7
    files = {f"folder/{number:03}.txt": b"%d" % number for number in range(30)}
    hub.create_repo(ID, files={**files, "model.safetensors": SHARD})
    found = open_hub(ID).files()
    assert set(found) == {*files, "model.safetensors"}
    assert found["model.safetensors"].sha256 == hashlib.sha256(SHARD).hexdigest()
    assert len(hub.requests("/tree/")) == 5


def test_several_threads_read_at_once(repo, open_hub):
    source = open_hub(ID)
    got: dict[int, bytes] = {}

    def read(start: int) -> None:
        got[start] = source.read("model.safetensors", start, start + 5000)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(0, 60000, 5000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert b"".join(got[start] for start in sorted(got)) == SHARD[:60000]


def test_fetching_leaves_one_file_and_nothing_in_a_cache(repo, open_hub, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    for name in ("HF_HUB_CACHE", "HF_HOME", "HF_XET_CACHE"):
        monkeypatch.setattr(constants, name, str(cache / name))
    (tmp_path / "scratch").mkdir()
    open_hub(ID).fetch("model.safetensors", tmp_path / "scratch" / "copy")
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["copy"]
    assert not cache.exists()


def test_fetching_never_writes_through_a_symlink(repo, open_hub, tmp_path):
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "copy").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        open_hub(ID).fetch("model.safetensors", tmp_path / "copy")
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_the_door_opens_a_hub_source(hub, repo):
    source = open_source(HubRef(ID), endpoint=hub.endpoint)
    assert isinstance(source, HubSource)
    assert source.rereads is False
    assert source.local_root() is None


def test_the_user_agent_tells_nothing_about_this_machine(hub, repo, open_hub):
    open_hub(ID).read("model.safetensors", 0, 10)
    assert {seen.headers["user-agent"] for seen in hub.seen} == {"pissa-service"}


# --- what is not there, or not allowed --------------------------------------------------------


def test_no_such_repo(hub, open_hub):
    with pytest.raises(RepoNotFound, match=r"has no model someone/nothing, or it is private"):
        open_hub("someone/nothing")
    with pytest.raises(RepoNotFound, match="this token cannot see it"):
        open_hub("someone/nothing", token=hub.create_token("me"))


def test_a_private_repo_is_open_to_its_readers_only(hub, open_hub):
    repo = hub.create_repo(ID, files=FILES, private=True)
    repo.readers.add("friend")
    with pytest.raises(RepoNotFound, match="or it is private and no token was given"):
        open_hub(ID)
    with pytest.raises(RepoNotFound, match="this token cannot see it"):
        open_hub(ID, token=hub.create_token("stranger"))
    source = open_hub(ID, token=hub.create_token("friend", role="read"))
    assert source.read("model.safetensors") == SHARD


def test_no_such_revision(repo, open_hub):
    with pytest.raises(RevisionNotFound, match="has no branch, tag or commit 'feature/x'"):
        open_hub(f"hf://{ID}@feature%2Fx")


def test_no_such_folder(repo, open_hub):
    with pytest.raises(FolderNotFound, match="has no folder 'outer'"):
        open_hub(f"hf://{ID}/outer")


def test_a_gated_repo_is_refused_when_opened_with_the_link_to_accept(hub, open_hub):
    repo = hub.create_repo(ID, files=FILES, gated=True)
    with pytest.raises(GatedRepo, match="is gated, and no token was given") as caught:
        open_hub(ID)
    assert f"{hub.endpoint}/{ID}" in caught.value.hint
    token = hub.create_token("someone-else")
    with pytest.raises(GatedRepo, match="the token's account has not been let in"):
        open_hub(ID, token=token)
    repo.readers.add("someone-else")
    assert open_hub(ID, token=token).read("config.json") == FILES["config.json"]


def test_a_token_without_the_permission(hub, repo, open_hub):
    token = hub.create_token("me", forbidden={ID})
    with pytest.raises(NoReadAccess, match="forbids reading someone/model with this token"):
        open_hub(ID, token=token)


def test_a_repo_the_hub_has_disabled(hub, repo, open_hub):
    repo.disabled = True
    with pytest.raises(NoReadAccess, match="has disabled access to someone/model"):
        open_hub(ID)


def test_an_unknown_or_expired_token(hub, repo, open_hub):
    token = hub.create_token("me")
    source = open_hub(ID, token=token)
    hub.tokens[token].valid = False
    for work in (lambda: open_hub(ID, token=token), lambda: source.read("config.json")):
        with pytest.raises(TokenInvalid, match="wrong, expired or revoked") as caught:
            work()
        assert caught.value.hint.endswith("/settings/tokens")


@pytest.mark.parametrize("token", ["hf_secret\n", "hf_secrét", "hf secret", "hf_\0secret"])
def test_a_token_that_cannot_be_one_is_not_sent(hub, repo, open_hub, token):
    with pytest.raises(TokenInvalid, match="characters that no token has") as caught:
        open_hub(ID, token=token)
    assert "secr" not in f"{caught.value} {caught.value.hint}"
    assert hub.seen == []


def test_the_token_is_in_no_message(hub, repo, open_hub):
    token = hub.create_token("me", forbidden={ID})
    errors: list[BaseException] = []
    for work in (
        lambda: open_hub(ID, token=token),
        lambda: open_hub("someone/nothing", token=token),
        lambda: open_hub(ID, token=token[:-1]),
    ):
        with pytest.raises(AccessError) as caught:
            work()
        errors.append(caught.value)
    while errors:
        error = errors.pop()
        assert token[:-1] not in f"{error!r} {error} {vars(error)}"
        errors += [cause for cause in (error.__cause__, error.__context__) if cause]


def test_the_storage_never_sees_the_token(hub, repo, open_hub):
    source = open_hub(ID, token=hub.create_token("me"))
    assert source.read("model.safetensors", 5, 10) == SHARD[5:10]
    assert all("authorization" in seen.headers for seen in hub.requests("^/(api|someone)/"))
    assert all("authorization" not in seen.headers for seen in hub.requests("^/blobs/"))


def test_without_a_token_the_clients_own_is_used(hub, monkeypatch):
    hub.create_repo(ID, files=FILES, private=True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", hub.create_token("someone"))
    assert HubSource(HubRef(ID), endpoint=hub.endpoint).read("config.json")


# --- what goes wrong on the way ---------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 500, 502, 503, 504])
@pytest.mark.parametrize("path", ["^/api/models/", "/resolve/", "^/blobs/"])
def test_a_passing_server_error_is_waited_out(hub, repo, open_hub, status, path):
    hub.faults.add(Fault(path, times=2, status=status))
    assert open_hub(ID).read("model.safetensors", 0, 100) == SHARD[:100]


def test_a_server_error_that_stays_is_reported(hub, repo, open_hub):
    hub.faults.add(Fault("^/api/", times=1000, status=503))
    with pytest.raises(HubUnavailable, match=r"127\.0\.0\.1:\d+ answered with status 503"):
        open_hub(ID)


def test_a_hub_that_is_not_there(hub, repo, open_hub):
    source = open_hub(ID)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    client = HubClient(endpoint=f"http://127.0.0.1:{port}", opening=Patience(0.2, 0.2, 0.01))
    with pytest.raises(HubUnavailable, match=rf"127\.0\.0\.1:{port} cannot be reached \(.*refused"):
        HubSource(HubRef(ID), client=client)
    hub.faults.add(Fault("/resolve/", times=1000, drop=True))
    with pytest.raises(HubUnavailable, match="cannot be reached"):
        source.read("config.json")


def test_a_hub_whose_name_is_unknown():
    client = HubClient(endpoint="http://nowhere.invalid", opening=Patience(0.1, 0.1, 0.01))
    with pytest.raises(HubUnavailable, match=r"nowhere\.invalid cannot be reached"):
        HubSource(HubRef(ID), client=client)


@pytest.mark.parametrize(
    "endpoint", ["ftp://user:hidden@example.invalid", "user:hidden@example.invalid", "http://"]
)
def test_an_address_that_is_none(endpoint):
    with pytest.raises(HubUnavailable, match=r"^the Hub at \S+ cannot be reached") as caught:
        HubSource(HubRef(ID), endpoint=endpoint)
    assert "HF_ENDPOINT" in caught.value.hint
    assert "hidden" not in f"{caught.value} {caught.value.hint}"


def test_a_silent_hub_is_left_after_the_timeout(hub, repo, open_hub, monkeypatch):
    monkeypatch.setattr(hub_adapter.client, "TIMEOUT", 0.1)
    hub.faults.add(Fault("/resolve/", times=1000, stall_s=0.3))
    source = open_hub(ID)
    with pytest.raises(HubUnavailable, match="timed out"):
        source.read("config.json")


def test_a_page_in_place_of_the_hub(hub, repo, open_hub):
    hub.faults.add(Fault("^/api/", body=b"<html>please log in</html>"))
    with pytest.raises(HubUnavailable, match="did not answer as a Hub does"):
        open_hub(ID)
    hub.faults.add(Fault("^/api/", body=b'["not", "a", "repo"]'))
    with pytest.raises(HubUnavailable, match="did not answer as a Hub does"):
        open_hub(ID)


def test_offline_mode_is_named(hub, repo, open_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnavailable, match="set to offline") as caught:
        open_hub(ID)
    assert "HF_HUB_OFFLINE" in caught.value.hint


@pytest.mark.parametrize(
    "headers",
    [{"Retry-After": "1"}, {"RateLimit": '"api";r=0;t=1'}, {"Retry-After": "soon"}, {}],
)
def test_a_rate_limit_is_waited_for_as_told(hub, repo, open_hub, headers):
    hub.faults.add(Fault("/resolve/", status=429, headers=headers))
    assert open_hub(ID).read("config.json") == FILES["config.json"]


def test_a_longer_pause_than_is_granted_is_reported_at_once(hub, repo, open_hub):
    hub.faults.add(Fault("/resolve/", status=429, headers={"Retry-After": "86400"}))
    source = open_hub(ID)
    with pytest.raises(RateLimited, match="asks to wait 86400 s") as caught:
        source.read("config.json")
    assert caught.value.retryable
    assert len(hub.requests("/resolve/")) == 1


@pytest.mark.parametrize("seconds", ["0", "1"])
def test_a_hub_that_asks_to_wait_for_ever_is_left(hub, repo, open_hub, seconds):
    hub.faults.add(Fault("^/api/", times=10**9, status=429, headers={"Retry-After": seconds}))
    with pytest.raises(RateLimited, match="takes no more requests"):
        open_hub(ID)


def test_a_cut_download_goes_on_where_it_was(hub, repo, open_hub, tmp_path):
    hub.faults.add(Fault("^/blobs/", times=3, cut_after=700_000))
    source = open_hub(ID)
    before = hub.sent_bytes()
    source.fetch("model.safetensors", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == SHARD
    assert hub.sent_bytes() - before < len(SHARD) + 1000
    asked = [seen.headers.get("range") for seen in hub.requests("^/blobs/")]
    assert asked == [None, *(f"bytes={700_000 * cut}-{len(SHARD) - 1}" for cut in (1, 2, 3))]


def test_a_download_that_brings_nothing_more_is_given_up(hub, repo, open_hub, tmp_path):
    hub.faults.add(Fault("^/blobs/", times=10**9, cut_after=10))
    with pytest.raises(HubUnavailable, match="cannot be reached"):
        open_hub(ID).fetch("model.safetensors", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_dripping_download_is_opened_anew(hub, repo, open_hub, monkeypatch):
    monkeypatch.setattr(hub_adapter.client, "_PACE_WINDOW_S", 0.05)
    hub.faults.add(Fault("/resolve/", drip=1, drip_s=0.02))
    assert open_hub(ID).read("config.json") == FILES["config.json"]
    first, second = hub.requests("/resolve/")
    assert first.sent < len(FILES["config.json"])
    assert second.headers["range"].startswith("bytes=")


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_wrong_bytes_are_noticed_and_removed(hub, repo, open_hub, tmp_path, path):
    hub.faults.add(Fault("^/blobs/|config", corrupt_at=17))
    source = open_hub(ID)
    with pytest.raises(DownloadCorrupt, match=f"{path} of someone/model arrived with") as caught:
        source.fetch(path, tmp_path / "copy")
    assert caught.value.retryable
    assert not (tmp_path / "copy").exists()
    source.fetch(path, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == FILES[path]


def test_a_storage_that_ignores_ranges_still_serves(hub, repo, open_hub):
    hub.faults.add(Fault("^/blobs/", ignore_range=True))
    assert open_hub(ID).read("model.safetensors", 1000, 3000) == SHARD[1000:3000]


def test_a_very_large_file_is_asked_for_in_pieces(hub, repo, open_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_adapter.client, "PIECE", 1 << 20)
    open_hub(ID).fetch("model.safetensors", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == SHARD
    assert len(hub.requests("^/blobs/")) == 3


def test_a_commit_that_is_gone_is_a_changed_source(hub, repo, open_hub):
    source = open_hub(ID)
    repo.commits.clear()
    repo.branches.clear()
    repo.commit({"config.json": b"rewritten history"})
    with pytest.raises(SourceChanged, match="changed while it was being read: the commit that"):
        source.read("config.json")


def test_a_file_of_another_size_is_a_changed_source(hub, repo, open_hub):
    source = open_hub(ID)
    for path, start in (("model.safetensors", 0), ("model.safetensors", 5)):
        file = repo.commits[source.commit].files[path]
        object.__setattr__(file, "blob", Bytes(SHARD[:-1]))
        with pytest.raises(SourceChanged, match=f"listed with {len(SHARD)} bytes now has"):
            source.read(path, start)


def test_a_full_disk_leaves_nothing_behind(repo, open_hub, tmp_path, monkeypatch):
    import errno

    from pissa_core.errors import DiskFull

    def full(fd: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pissa_core.adapters.hub.source.reserve", full)
    with pytest.raises(DiskFull, match="is full"):
        open_hub(ID).fetch("model.safetensors", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
