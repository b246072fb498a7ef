"""The way back over HTTP: residual, adapter and original on the Hub, read by ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tinymodels
import transformers
from conversions import checksums, fold_to
from hub.state import Hub
from huggingface_hub import snapshot_download

from pissa_core.adapters import folding_digest, open_sink, open_source
from pissa_core.engine import carry_out, convert
from pissa_core.errors import RepoNotFound
from pissa_core.events import MatrixDone, Published, ShardSealed
from pissa_core.fold.planning import make_fold_plan
from pissa_core.fold.work import Beside
from pissa_core.refs import LocalRef, Ref, parse_ref
from pissa_core.runtime import Runtime
from pissa_core.spec import parse_config
from pissa_core.verify.asking import make_case
from pissa_core.verify.examine import Examined, examine
from pissa_core.verify.report import make_report


@pytest.fixture
def pair(hub: Hub, tmp_path: Path) -> Path:
    """An original and its converted form, both repos; returns the local copy of the latter."""
    model = tinymodels.save_model(
        "llama", tmp_path / "model", dtype="bf16", max_shard_size=tinymodels.SHARDED
    )
    hub.create_repo("org/tiny", model)
    source = open_source(parse_ref("org/tiny"), endpoint=hub.endpoint)
    sink = open_sink(LocalRef(str(tmp_path / "pair")), digest="pair")
    list(convert(source, sink, parse_config({"rank": 4}), Runtime(device="cpu")))
    hub.create_repo("me/pair", tmp_path / "pair")
    return tmp_path / "pair"


def report_of(hub: Hub, original: str, converted: str) -> dict[str, Any]:
    sources = [open_source(parse_ref(ref), endpoint=hub.endpoint) for ref in (original, converted)]
    case = make_case(*sources)
    events = list(examine(case, *sources))
    rows = [event.row for event in events if isinstance(event, MatrixDone)]
    findings = [event.finding.as_dict() for event in events if isinstance(event, Examined)]
    return make_report(case, rows, findings)


def test_a_published_pair_is_verified_from_afar(hub, pair):
    report = report_of(hub, "org/tiny", "me/pair")
    assert [check for check in report["checks"] if check["faults"]] == []
    assert report["passed"]
    assert (
        report["source"]["commit"]
        == open_source(parse_ref("org/tiny"), endpoint=hub.endpoint).commit
    )
    with pytest.raises(RepoNotFound, match="me/nothing"):
        report_of(hub, "org/tiny", "me/nothing")


def test_a_pair_of_another_commit_of_the_original_is_a_fault(hub, pair, tmp_path):
    other = tinymodels.save_model("llama", tmp_path / "other", dtype="fp16")
    hub.create_repo("org/other", other)
    report = report_of(hub, "org/other", "me/pair")
    assert not report["passed"]
    (fault,) = [f for c in report["checks"] for f in c["faults"] if f["where"] == "source"]
    assert "hf://org/tiny@" in fault["what"]


def test_residual_and_adapter_on_the_hub_become_the_original(hub, pair, tmp_path):
    def open_other(ref: Ref):
        return open_source(ref, endpoint=hub.endpoint)

    residual = open_other(parse_ref("me/pair"))
    adapter = open_other(parse_ref("hf://me/pair/pissa_init"))
    plan = make_fold_plan(residual, adapter, open_other)
    assert plan.fold.initial
    assert plan.fold.original.startswith("hf://org/tiny@")
    digest = folding_digest(residual, adapter, "plain")
    sink = open_sink(LocalRef(str(tmp_path / "plain")), digest=digest)
    beside = Beside(adapter, open_other(parse_ref(plan.fold.original)))
    events = list(carry_out(plan, residual, sink, Runtime(device="cpu"), beside=beside))
    manifest = next(event.manifest for event in events if isinstance(event, Published))
    assert manifest["totals"]["equal_weights"] > manifest["totals"]["weights"] / 2
    assert manifest["original"]["commit"] == beside.original.commit
    card = (tmp_path / "plain/README.md").read_text()
    assert "base_model: org/tiny" in card
    assert "me/pair" in card
    assert not list(tmp_path.glob(".plain*"))
    assert set(checksums(tmp_path / "plain")) == set(manifest["files"]) | {"pissa_manifest.json"}


def test_a_fold_stopped_midway_is_finished_on_another_machine(hub, pair, open_hub_sink, tmp_path):
    def open_other(ref: Ref):
        return open_source(ref, endpoint=hub.endpoint)

    token = hub.create_token("me")
    residual, adapter = map(open_other, map(parse_ref, ("me/pair", "hf://me/pair/pissa_init")))
    plan = make_fold_plan(residual, adapter, open_other)
    assert len(plan.shards) > 2
    beside = Beside(adapter, open_other(parse_ref(plan.fold.original)))

    def course(machine: str):
        digest = folding_digest(residual, adapter, "me/plain")
        sink = open_hub_sink("me/plain", token, digest=digest, machine=machine)
        return carry_out(plan, residual, sink, Runtime(device="cpu", slots=1), beside=beside)

    events = course("here")
    first = next(event for event in events if isinstance(event, ShardSealed))
    events.close()
    assert set(hub.repos["me/plain"].resolve("main").files) <= {".gitattributes"}
    before = hub.sent_bytes(f"me/pair/{first.shard}")

    resumed = [event for event in course("there") if isinstance(event, ShardSealed)]

    assert [event.resumed for event in resumed if event.shard == first.shard] == [True]
    assert hub.sent_bytes(f"me/pair/{first.shard}") == before
    assert set(hub.uploads.finished.values()) == {1}
    assert list(hub.repos["me/plain"].branches) == ["main"]
    down = tmp_path / "down"
    snapshot_download("me/plain", endpoint=hub.endpoint, local_dir=down)
    fold_to(pair, pair / "pissa_init", tmp_path / "alone")
    mine, theirs = checksums(down), checksums(tmp_path / "alone")
    assert mine.keys() - theirs.keys() <= {".gitattributes"} | {
        path for path in mine if path.startswith(".cache/")
    }
    shards = [path for path in theirs if path.endswith(".safetensors")]
    assert {path: mine[path] for path in shards} == {path: theirs[path] for path in shards}
    model = transformers.AutoModelForCausalLM.from_pretrained(down)
    assert model.config.num_hidden_layers == 2
