"""A result on the Hub: staged on a branch, nothing sent or fetched twice, shown by one commit."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hub_tools import IN, OUT, PROBE, run, shards_of, shown
from places import contents_of, make_seal, publication, seal_in

from pissa_core.adapters.hub.permissions import may_create
from pissa_core.adapters.hub.sweeping import KEPT, PREFIX, RESULT, sweep_stale
from pissa_core.adapters.hub.writer import HubWriter
from pissa_core.adapters.memory import MemorySource
from pissa_core.engine import convert
from pissa_core.errors import (
    Cancelled,
    NoWriteAccess,
    OutputExists,
    OutputIsSource,
    TokenInvalid,
)
from pissa_core.events import MatrixDone
from pissa_core.runtime import Runtime
from pissa_core.spec import parse_config

LOCAL = MemorySource({})
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


def test_a_repo_is_converted_into_a_new_repo(
    hub, open_hub, open_hub_sink, somebodys_token, tmp_path
):
    source = open_hub(IN, somebodys_token)
    ref = run(source, open_hub_sink(OUT, somebodys_token))
    repo = hub.repos[OUT]
    assert ref == f"hf://{OUT}@{repo.branches['main']}"
    assert list(repo.branches) == ["main"]
    assert not repo.private
    assert len(repo.history("main")) == 2
    contents = contents_of(hub, OUT)
    manifest = json.loads(contents["pissa_manifest.json"])
    assert set(manifest["files"]) == set(contents) - {"pissa_manifest.json"}
    assert {path: sha for path, sha in shown(hub).items() if path in manifest["files"]} == {
        path: file["sha256"] for path, file in manifest["files"].items()
    }
    adapter_config = json.loads(contents["pissa_init/adapter_config.json"])
    assert adapter_config["base_model_name_or_path"] == OUT
    assert adapter_config["revision"] is None
    assert not list(tmp_path.glob("here/**/*"))
    # Every shard comes down once, but for its header, and goes up once.
    for path in shards_of(source):
        size = source.files()[path].size
        assert size <= hub.sent_bytes(f"{IN}/{path}") <= size + (64 << 10)
    assert set(hub.uploads.finished.values()) == {1}


@pytest.mark.parametrize("cross_repo", [True, False])
def test_shards_without_targets_are_copied_on_the_hub_where_it_can(
    hub, open_hub, open_hub_sink, somebodys_token, cross_repo
):
    hub.cross_repo = cross_repo
    source = open_hub(IN, somebodys_token)
    run(
        source,
        open_hub_sink(OUT, somebodys_token),
        target_modules=["q_proj"],
        layers_to_transform=[0],
    )
    contents, files = contents_of(hub, OUT), source.files()
    shards = shards_of(source)
    down = {path: hub.sent_bytes(f"{IN}/{path}") for path in shards}
    same = [path for path in shards if contents[path] == source.read(path)]
    assert 0 < len(same) < len(shards)
    for path in same:
        uploads = hub.uploads.finished[files[path].sha256]
        assert uploads == (0 if cross_repo else 1)
        assert down[path] == min(files[path].size, PROBE) + files[path].size * (not cross_repo)


def test_large_side_files_are_copied_on_the_hub_too(hub, open_hub_sink, open_hub):
    hub.cross_repo = True
    large = bytes(range(256)) * (11 << 12)
    hub.create_repo(IN, files={"config.json": b"{}", "sub/folder/notes.txt": large})
    token, seen = hub.create_token("somebody"), {}

    def closing(files):
        seen.update(files)
        return {"manifest.json": b"{}"}

    source = open_hub(IN, token)
    sink = open_hub_sink(OUT, token)
    seal_in(sink)
    sink.publish(publication(source=source, closing=closing, copies=("sub/folder/notes.txt",)))
    assert contents_of(hub, OUT)["sub/folder/notes.txt"] == large
    assert seen["sub/folder/notes.txt"].sha256 == source.files()["sub/folder/notes.txt"].sha256
    assert hub.sent_bytes(f"{IN}/sub/folder/notes.txt") == 0


def test_what_a_gitignore_names_is_published_all_the_same(hub, open_hub_sink):
    token = hub.create_token("somebody")
    source = MemorySource({".gitignore": b"*.json\n*.safetensors\n", "config.json": b"{}"})
    sink = open_hub_sink(OUT, token)
    seal_in(sink)
    sink.publish(publication(source=source, copies=(".gitignore", "config.json")))
    assert {"config.json", "model.safetensors"} <= contents_of(hub, OUT).keys()


def test_another_machine_goes_on_from_the_branch(hub, open_hub, open_hub_sink, somebodys_token):
    source = open_hub(IN, somebodys_token)
    asked = run(source, open_hub_sink("somebody/undisturbed", somebodys_token))
    assert asked.startswith("hf://somebody/undisturbed@")
    before = {path: hub.sent_bytes(f"{IN}/{path}") for path in shards_of(source)}
    stopping = open_hub_sink(OUT, somebodys_token, machine="first")
    events = convert(source, stopping, parse_config({"rank": 2}), Runtime(device="cpu", slots=1))
    begun = set()
    for event in events:
        begun |= {event.shard} if isinstance(event, MatrixDone) else set()
        if len(begun) == 2:  # the first is being sealed, or is
            events.close()
    done = [path for path in shards_of(source) if stopping.seal_of(path)]
    assert 0 < len(done) < len(shards_of(source))
    assert contents_of(hub, OUT) == {}
    run(open_hub(IN, somebodys_token), open_hub_sink(OUT, somebodys_token, machine="second"))
    for path in done:
        # A header for each of two plans, and once to convert it.
        down, size = hub.sent_bytes(f"{IN}/{path}") - before[path], source.files()[path].size
        assert down == size + 2 * min(size, PROBE)
    assert set(hub.uploads.finished.values()) == {2}  # once for each of the two repos
    theirs, ours = contents_of(hub, "somebody/undisturbed"), contents_of(hub, OUT)
    differing = {path for path in theirs.keys() | ours if theirs.get(path) != ours.get(path)}
    # They name the output.
    assert differing <= {"README.md", "pissa_manifest.json", "pissa_init/adapter_config.json"}


def test_a_new_branch_appears_with_everything_on_it(hub, open_hub_sink):
    repo = hub.create_repo(OUT, files={"other.txt": b"on main"})
    token = hub.create_token("somebody")
    sink = open_hub_sink(f"{OUT}@r16", token)
    sink.check(LOCAL)
    seal_in(sink)
    assert "r16" not in repo.branches
    sink.publish(publication())
    assert (sink.revision, sink.base_model_name_or_path) == ("r16", OUT)
    assert sink.ref == f"hf://{OUT}@{repo.branches['r16']}"
    assert len(repo.history("r16")) == 2
    sink.discard()
    assert sorted(repo.branches) == ["main", "r16"]
    assert "other.txt" not in contents_of(hub, OUT, "r16")
    assert contents_of(hub, OUT) == {"other.txt": b"on main"}


def test_overwriting_leaves_nothing_of_what_was_there(hub, open_hub_sink):
    repo = hub.create_repo(OUT, files={"other.txt": b"old", "config.json": b"old"})
    token = hub.create_token("somebody")
    before = repo.branches["main"]
    sink = open_hub_sink(OUT, token, overwrite=True, commit_message="A new one")
    sink.check(LOCAL)
    seal_in(sink)
    sink.publish(publication())
    sink.discard()
    (made, old) = repo.history("main")
    assert (made.title, old.oid) == ("A new one", before)
    contents = contents_of(hub, OUT)
    assert "other.txt" not in contents
    assert contents["config.json"] != b"old"


def test_a_private_repo_is_made_private_and_a_public_one_refused(hub, open_hub_sink):
    token = hub.create_token("somebody")
    sink = open_hub_sink(OUT, token, private=True)
    seal_in(sink)
    assert hub.repos[OUT].private
    hub.create_repo("somebody/public")
    with pytest.raises(OutputExists, match="is public"):
        open_hub_sink("somebody/public", token, private=True).check(LOCAL)


@pytest.mark.parametrize(
    "files",
    [{}, {".gitattributes": b"*.bin filter=lfs"}, {"README.md": b"---\nlicense: mit\n---\n"}],
)
def test_a_repo_that_only_the_hub_wrote_to_is_free(hub, open_hub_sink, files):
    hub.create_repo(OUT, files=files)
    open_hub_sink(OUT, hub.create_token("somebody")).check(LOCAL)


@pytest.mark.parametrize(
    "files", [{"config.json": b"{}"}, {"README.md": b"---\nlicense: mit\n---\n# A model"}]
)
def test_a_repo_with_content_of_its_own_is_refused(hub, open_hub_sink, files):
    hub.create_repo(OUT, files=files)
    token = hub.create_token("somebody")
    with pytest.raises(OutputExists, match="not empty"):
        open_hub_sink(OUT, token).check(LOCAL)
    open_hub_sink(OUT, token, overwrite=True).check(LOCAL)
    open_hub_sink(f"{OUT}@elsewhere", token).check(LOCAL)


def test_the_source_is_never_written_to(hub, open_hub, open_hub_sink):
    repo = hub.create_repo(OUT, files={"config.json": b"{}"})
    somebodys_token = hub.create_token("somebody")
    source = open_hub(OUT, somebodys_token)
    pinned = open_hub(f"{OUT}@{source.commit}", somebodys_token)
    with pytest.raises(OutputIsSource, match="same branch main"):
        open_hub_sink(OUT, somebodys_token, overwrite=True).check(pinned)
    repo.commit({"later.txt": b""})
    with pytest.raises(OutputIsSource, match="same branch main"):
        open_hub_sink(OUT, somebodys_token, overwrite=True).check(source)


def test_a_model_may_be_published_on_another_branch_of_its_own_repo(hub, open_hub, open_hub_sink):
    hub.create_repo(OUT, files={"config.json": b"{}", "sub/folder/notes.txt": b""})
    somebodys_token = hub.create_token("somebody")
    source = open_hub(OUT, somebodys_token)
    for _ in range(2):
        sink = open_hub_sink(f"{OUT}@pissa", somebodys_token, overwrite=True)
        sink.check(source)
        seal_in(sink)
        sink.publish(publication(source=source))
        sink.discard()
    assert set(contents_of(hub, OUT)) == {"config.json", "sub/folder/notes.txt"}
    assert "manifest.json" in contents_of(hub, OUT, "pissa")


def test_scratch_that_nobody_came_back_for_goes(hub, open_hub_sink, tmp_path):
    somebodys_token = hub.create_token("somebody")
    for digest in ("old", "young"):
        with open_hub_sink(OUT, somebodys_token, digest=digest).attempt("a") as attempt:
            (attempt.folder / "journal").write_text("half done")
    left = tmp_path / "here" / "old"
    for path in left.rglob("*"):
        os.utime(path, (0, 0))
    with open_hub_sink(OUT, somebodys_token).attempt("a"):
        assert not list(left.glob("*/*/journal"))
        assert list((tmp_path / "here" / "young").glob("*/*/journal"))


@pytest.mark.parametrize(
    ("repo_id", "kind", "error"),
    [
        ("somebody/new", {"role": "read"}, NoWriteAccess),
        ("another/new", {}, NoWriteAccess),
        ("another/old", {}, NoWriteAccess),
        ("somebody/old", {"role": "read"}, NoWriteAccess),
        ("somebody/old", {"valid": False}, TokenInvalid),
        ("somebody/new", {"valid": False}, TokenInvalid),
        ("org/new", {}, NoWriteAccess),
        ("org/new", {"orgs": {"org"}}, None),
        ("somebody/new", {}, None),
        ("somebody/old", {}, None),
    ],
)
def test_the_right_to_write_is_asked_for_before_any_work(hub, open_hub_sink, repo_id, kind, error):
    hub.create_repo("another/old")
    hub.create_repo("somebody/old")
    sink = open_hub_sink(repo_id, hub.create_token("somebody", **kind))
    if error is None:
        sink.check(LOCAL)
        return
    with pytest.raises(error) as caught:
        sink.check(LOCAL)
    assert caught.value.hint
    assert not hub.commits


@pytest.mark.parametrize("repo_id", ["somebody/new", "somebody/old"])
def test_without_a_token_nothing_is_written(hub, open_hub_sink, repo_id):
    hub.create_repo("somebody/old")
    with pytest.raises(NoWriteAccess, match="without a token"):
        open_hub_sink(repo_id, None).check(LOCAL)


@pytest.mark.parametrize(
    ("scopes", "may"),
    [
        ([{"entity": {"name": "me"}, "permissions": ["repo.write"]}], True),
        ([{"entity": {"name": "me"}, "permissions": ["repo.content.read"]}], False),
        ([{"entity": {"name": "org"}, "permissions": ["repo.write"]}], False),
        ([], False),
    ],
)
def test_a_fine_grained_token_says_where_it_may_write(scopes, may):
    token = {"role": "fineGrained", "fineGrained": {"scoped": scopes}}
    assert may_create({"name": "me", "auth": {"accessToken": token}}, "Me") is may


def test_a_part_that_was_altered_loses_its_seal(hub, open_hub_sink):
    sink = open_hub_sink(OUT, hub.create_token("somebody"))
    seal_in(sink)
    repo = hub.repos[OUT]
    (path,) = [path for path in repo.resolve(PREFIX + "d1").files if "part." in path]
    repo.commit({path: b"altered"}, branch=PREFIX + "d1")
    assert sink.seal_of("model.safetensors") is None
    seal_in(sink)
    assert sink.seal_of("model.safetensors") == make_seal()


def test_an_attempt_whose_branch_was_discarded_stops_and_leaves_nothing(
    hub, open_hub_sink, tmp_path
):
    token = hub.create_token("somebody")
    with open_hub_sink(OUT, token).attempt("model.safetensors") as attempt:
        (attempt.folder / "shard").write_bytes(b"s")
        (attempt.folder / "part").write_bytes(b"p")
        open_hub_sink(OUT, token, machine="there").discard()
        with pytest.raises(Cancelled, match="discarded"):
            attempt.seal(make_seal(b"s", b"p"), attempt.folder / "shard", attempt.folder / "part")
    assert not list(tmp_path.glob("here/**/*"))


def test_stale_staging_goes_with_the_next_job_and_fresh_staging_stays(hub, open_hub_sink):
    token = hub.create_token("somebody")
    seal_in(open_hub_sink(OUT, token, digest="old"))
    with open_hub_sink(OUT, token, digest="begun").attempt("model.safetensors"):
        pass
    writer = HubWriter(open_hub_sink(OUT, token)._writer.client, OUT)
    for name in (PREFIX + "old", PREFIX + "gone"):
        writer.create_branch(name + RESULT)
    made = writer.history(PREFIX + "old")[0][1]
    young, old = made + KEPT - timedelta(hours=1), made + 2 * KEPT
    assert sweep_stale(writer, but=PREFIX + "d1", now=young) == [PREFIX + "gone" + RESULT]
    assert sweep_stale(writer, but=PREFIX + "old", now=old) == [PREFIX + "begun"]
    assert sweep_stale(writer, but=PREFIX + "d1", now=old) == [
        PREFIX + "old",
        PREFIX + "old" + RESULT,
    ]
    assert list(hub.repos[OUT].branches) == ["main"]


def test_staging_is_begun_with_a_commit_of_its_own(hub, open_hub_sink):
    """An old model's `main` says nothing about when its staging was begun."""
    repo = hub.create_repo(OUT, files={"config.json": b"{}"})
    repo.commits = {oid: replace(made, at=LONG_AGO) for oid, made in repo.commits.items()}
    token = hub.create_token("somebody")
    with open_hub_sink(f"{OUT}@pissa", token, digest="begun").attempt("model.safetensors"):
        open_hub_sink(f"{OUT}@pissa", token, digest="d2").check(LOCAL)
    assert PREFIX + "begun" in repo.branches
