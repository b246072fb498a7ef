"""The writing side of the test Hub, as the official client uses it."""

from __future__ import annotations

import hashlib
import os
from urllib.parse import urlsplit

import pytest
from hub.faults import Fault
from hub.server import running
from hub.state import Hub
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

ID = "me/model"
SHARD = os.urandom(300_000)
SHA = hashlib.sha256(SHARD).hexdigest()
STAGING = "pissa/staging"


@pytest.fixture
def api(hub):
    api = HfApi(endpoint=hub.endpoint, token=hub.create_token("me"))
    api.create_repo(ID)
    return api


def names(api, revision="main"):
    return set(api.list_repo_files(ID, revision=revision)) - {".gitattributes"}


def content(hub, path, revision="main"):
    blob = hub.repos[ID].resolve(revision).files[path].blob
    return blob.read(0, blob.size)


def add(api, files, revision="main", **kind):
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    return api.create_commit(ID, operations, commit_message="add", revision=revision, **kind)


def test_a_repo_is_made_once(hub, api):
    assert api.create_repo(ID, exist_ok=True).repo_id == ID
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo(ID)
    assert caught.value.response.status_code == 409
    api.create_repo("me/hidden", private=True)
    assert hub.repos["me/hidden"].private
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=hub.endpoint, token=False).model_info("me/hidden")
    api.delete_repo("me/hidden")
    assert not api.repo_exists("me/hidden")


def test_small_and_large_files_arrive(hub, api):
    files = {"config.json": b"{}", "a/model.safetensors": SHARD, "empty.bin": b""}
    info = add(api, files)
    assert info.oid == api.model_info(ID).sha
    assert {path: content(hub, path) for path in files} == files
    entries = {entry.path: entry for entry in api.list_repo_tree(ID, recursive=True, expand=True)}
    assert entries["a/model.safetensors"].lfs.sha256 == SHA
    assert entries["config.json"].lfs is None
    assert hub.uploads.finished == {SHA: 1}
    assert hub.received_bytes(SHA) == len(SHARD)


def test_what_is_there_is_not_sent_again(hub, api):
    add(api, {"model.safetensors": SHARD})
    add(api, {"other.safetensors": SHARD})
    assert hub.uploads.finished == {SHA: 1}
    before = hub.commits.copy()
    add(api, {"other.safetensors": SHARD})
    assert hub.commits == before == [(ID, "main")] * 2


def test_a_file_in_parts(hub, api):
    hub.uploads.part_size = 100_001
    add(api, {"model.safetensors": SHARD})
    assert content(hub, "model.safetensors") == SHARD
    assert len(hub.requests("^/uploads/", method="PUT")) == 3
    assert hub.uploads.finished == {SHA: 1}


def test_files_from_disk_are_streamed(hub, api, tmp_path):
    (tmp_path / "file").write_bytes(SHARD)
    api.upload_file(path_or_fileobj=tmp_path / "file", path_in_repo="x.safetensors", repo_id=ID)
    assert content(hub, "x.safetensors") == SHARD


def test_a_staging_branch_and_one_commit_of_copies(hub, api):
    """The way of the sink: preupload, commit to a branch, copy to main, drop the branch."""
    api.create_branch(ID, branch=STAGING)
    operation = CommitOperationAdd("model.safetensors", SHARD)
    api.preupload_lfs_files(ID, [operation], revision=STAGING)
    assert operation.path_or_fileobj == b""
    api.create_commit(ID, [operation], commit_message="sealed", revision=STAGING)
    add(api, {"config.json": b"{}"}, revision=STAGING)
    assert names(api) == set()
    assert STAGING in [branch.name for branch in api.list_repo_refs(ID).branches]
    copies = [
        CommitOperationCopy(path, path, src_revision=STAGING)
        for path in ("model.safetensors", "config.json")
    ]
    head = api.model_info(ID).sha
    api.create_commit(ID, copies, commit_message="all", parent_commit=head)
    api.delete_branch(ID, branch=STAGING)
    assert names(api) == {"model.safetensors", "config.json"}
    assert content(hub, "model.safetensors") == SHARD
    assert hub.commits == [(ID, STAGING), (ID, STAGING), (ID, "main")]
    assert [commit.title for commit in api.list_repo_commits(ID)] == ["all", "initial commit"]
    with pytest.raises(RevisionNotFoundError):
        api.list_repo_files(ID, revision=STAGING)


def test_branches(api):
    api.create_branch(ID, branch=STAGING)
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_branch(ID, branch=STAGING)
    assert caught.value.response.status_code == 409
    api.create_branch(ID, branch=STAGING, exist_ok=True)
    with pytest.raises(RevisionNotFoundError):
        api.create_branch(ID, branch="other", revision="nothing")
    with pytest.raises(BadRequestError):
        api.create_branch(ID, branch="refs/pr/5")
    with pytest.raises(HfHubHTTPError):
        api.delete_branch(ID, branch="main")
    with pytest.raises(RevisionNotFoundError):
        api.delete_branch(ID, branch="nothing")
    with pytest.raises(RevisionNotFoundError):
        add(api, {"a.txt": b"a"}, revision="nothing")


def test_a_commit_on_an_old_parent_is_refused(hub, api):
    head = api.model_info(ID).sha
    add(api, {"a.txt": b"a"})
    with pytest.raises(HfHubHTTPError) as caught:
        add(api, {"b.txt": b"b"}, parent_commit=head)
    assert caught.value.response.status_code == 412
    assert names(api) == {"a.txt"}


def test_a_large_file_that_was_never_sent_is_refused(hub, api):
    operation = CommitOperationAdd("model.safetensors", SHARD)
    operation._upload_mode, operation._is_uploaded, operation._should_ignore = "lfs", True, False
    with pytest.raises(BadRequestError, match="does not exist"):
        api.create_commit(ID, [operation], commit_message="nothing behind it")
    assert names(api) == set()


def test_files_and_folders_go(api):
    add(api, {"a.txt": b"a", "inner/b.txt": b"b", "inner/c.txt": b"c"})
    api.create_commit(
        ID,
        [CommitOperationDelete("inner/"), CommitOperationAdd("inner/d.txt", b"d")],
        commit_message="folder",
    )
    api.delete_file("a.txt", ID)
    assert names(api) == {"inner/d.txt"}
    with pytest.raises(HfHubHTTPError, match="doesn't exist"):
        api.delete_file("a.txt", ID)


def test_a_card_with_broken_metadata_is_refused(api):
    with pytest.raises(ValueError, match="Invalid metadata"):
        add(api, {"README.md": b"---\ntags: [a\n---\ntext"})
    add(api, {"README.md": b"---\ntags: [a]\n---\ntext"})


def test_copies_across_repos_only_where_the_hub_can(hub, api):
    hub.create_repo("you/source", files={"model.safetensors": SHARD, "config.json": b"{}"})
    copies = [
        CommitOperationCopy(path, path, src_repo_id="you/source", src_repo_type="model")
        for path in ("model.safetensors", "config.json")
    ]
    with pytest.raises(ValueError, match="no xet hash"):
        api.create_commit(ID, copies, commit_message="copy")
    hub.cross_repo = True
    api.create_commit(ID, copies, commit_message="copy")
    assert content(hub, "model.safetensors") == SHARD
    assert hub.received_bytes(SHA) == hub.sent_bytes("you/source/model.safetensors") == 0


def test_a_large_file_that_no_commit_holds_is_forgotten_in_time(hub, api):
    api.create_branch(ID, branch=STAGING)
    api.preupload_lfs_files(ID, [lost := CommitOperationAdd("lost.safetensors", SHARD)])
    add(api, {"held.safetensors": b"held"}, revision=STAGING)
    hub.repos[ID].collect_garbage()
    with pytest.raises(BadRequestError, match="does not exist"):
        api.create_commit(ID, [lost], commit_message="too late")
    held = CommitOperationCopy("held.safetensors", "held.safetensors", src_revision=STAGING)
    api.create_commit(ID, [held], commit_message="held")
    assert content(hub, "held.safetensors") == b"held"


def test_a_hub_that_comes_back_has_what_it_had(tmp_path):
    hub = Hub(folder=tmp_path)
    with running(hub):
        api = HfApi(endpoint=hub.endpoint, token=hub.create_token("me"))
        api.create_repo(ID)
        add(api, {"model.safetensors": SHARD})
    with pytest.raises(Exception, match="refused"):
        api.model_info(ID)
    with running(hub, port=urlsplit(hub.endpoint).port):
        assert names(api) == {"model.safetensors"}
        assert content(hub, "model.safetensors") == SHARD


# --- who may ----------------------------------------------------------------------------------


def test_tokens_that_may_not_write(hub, api):
    hub.create_repo("you/theirs")
    for token, status in ((hub.create_token("me", role="read"), 403), (False, 401)):
        weak = HfApi(endpoint=hub.endpoint, token=token)
        for work in (
            lambda weak=weak: weak.auth_check(ID, write=True),
            lambda weak=weak: weak.create_branch(ID, branch="b"),
            lambda weak=weak: add(weak, {"a.txt": b"a"}),
            lambda weak=weak: weak.create_repo("me/other"),
        ):
            with pytest.raises(HfHubHTTPError) as caught:
                work()
            assert caught.value.response.status_code == status
    with pytest.raises(HfHubHTTPError):
        api.auth_check("you/theirs", write=True)
    with pytest.raises(HfHubHTTPError):
        api.create_repo("you/new")
    hub.repos["you/theirs"].writers.add("me")
    api.auth_check("you/theirs", write=True)


def test_tokens_for_some_repos_and_for_organisations(hub, api):
    some = HfApi(endpoint=hub.endpoint, token=hub.create_token("me", writes={ID}, orgs={"club"}))
    some.auth_check(ID, write=True)
    with pytest.raises(HfHubHTTPError):
        some.create_repo("club/model")
    assert [org["name"] for org in some.whoami()["orgs"]] == ["club"]
    member = HfApi(endpoint=hub.endpoint, token=hub.create_token("me", orgs={"club"}))
    member.create_repo("club/model")
    member.auth_check("club/model", write=True)


# --- faults -----------------------------------------------------------------------------------


def test_an_upload_cut_midway_is_sent_again(hub, api, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    (tmp_path / "file").write_bytes(SHARD)
    hub.faults.add(Fault("^/uploads/", method="PUT", cut_after=100_000))
    hub.faults.add(Fault("^/uploads/", method="PUT", status=503))
    add(api, {"model.safetensors": tmp_path / "file"})
    assert content(hub, "model.safetensors") == SHARD
    first, second, third = hub.requests("^/uploads/", method="PUT")
    assert (first.received, second.received, third.received) == (100_000, len(SHARD), len(SHARD))
    assert hub.uploads.finished == {SHA: 1}


def test_a_part_that_fails_is_sent_again_alone(hub, api, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.uploads.part_size = 100_000
    hub.uploads.swallow_from = 0
    hub.faults.add(Fault("^/uploads/.*/2$", method="PUT", cut_after=50_000))
    add(api, {"model.safetensors": SHARD})
    assert hub.received_bytes(SHA) == len(SHARD) + 50_000
    assert hub.repos[ID].resolve("main").files["model.safetensors"].blob.sha256 == SHA


def test_damage_on_the_way_up_is_noticed(hub, api):
    hub.faults.add(Fault("^/uploads/", method="PUT", corrupt_at=5))
    with pytest.raises(RuntimeError, match=r"uploading 'model\.safetensors'"):
        add(api, {"model.safetensors": SHARD})
    assert hub.uploads.finished == {}
    assert names(api) == set()


def test_a_commit_that_succeeds_though_the_answer_says_no(hub, api):
    hub.faults.add(Fault("/commit/main", method="POST", status=504, served=True))
    with pytest.raises(HfHubHTTPError) as caught:
        add(api, {"a.txt": b"a"})
    assert caught.value.response.status_code == 504
    assert names(api) == {"a.txt"}
    hub.faults.add(Fault("/commit/main", method="POST", drop=True, served=True))
    with pytest.raises(Exception, match="disconnected"):
        add(api, {"b.txt": b"b"})
    assert names(api) == {"a.txt", "b.txt"}
    assert hub.commits == [(ID, "main")] * 2


def test_refusals_of_storage_and_hub(hub, api):
    hub.faults.add(Fault("/objects/batch", method="POST", status=413))
    hub.faults.add(Fault("^/uploads/", method="PUT", status=403))
    for _ in range(2):
        with pytest.raises((HfHubHTTPError, RuntimeError)):
            add(api, {"model.safetensors": SHARD})
    hub.faults.add(Fault("/commit/", method="POST", status=429, headers={"Retry-After": "7"}))
    with pytest.raises(HfHubHTTPError) as caught:
        add(api, {"model.safetensors": SHARD})
    assert caught.value.response.headers["Retry-After"] == "7"
    assert hub.uploads.finished == {SHA: 1}
    add(api, {"model.safetensors": SHARD})
    assert hub.uploads.finished == {SHA: 1}


def test_an_upload_that_the_storage_takes_slowly(hub, api):
    hub.faults.add(Fault("^/uploads/", method="PUT", drip=50_000, drip_s=0.02))
    hub.faults.add(Fault("/commit/", method="POST", stall_s=0.1))
    add(api, {"model.safetensors": SHARD})
    assert content(hub, "model.safetensors") == SHARD


def test_a_token_that_is_revoked_midway(hub, api):
    def revoke(token):
        hub.tokens[token].valid = False

    hub.faults.add(Fault("/commit/", method="POST", skip=1, run=revoke))
    add(api, {"a.txt": b"a"})
    with pytest.raises(HfHubHTTPError) as caught:
        add(api, {"b.txt": b"b"})
    assert caught.value.response.status_code == 401
    assert list(hub.repos[ID].resolve("main").files) == [".gitattributes", "a.txt"]


def test_the_hub_keeps_only_checksums_of_what_it_swallows(hub, api):
    hub.uploads.swallow_from = 1000
    add(api, {"model.safetensors": SHARD, "small.safetensors": b"small"})
    assert list(hub.uploads.folder.rglob("*")) != []
    assert content(hub, "small.safetensors") == b"small"
    assert sum(path.stat().st_size for path in hub.uploads.folder.rglob("*") if path.is_file()) == 5
    with pytest.raises(HfHubHTTPError):
        api.hf_hub_download(ID, "model.safetensors", local_dir=hub.uploads.folder / "down")
