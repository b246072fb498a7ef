"""Jobs on a real worker: Celery processes, Valkey, files."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
from conftest import Service
from safetensors import safe_open
from worker_tools import (
    checksums,
    leftovers,
    request,
    wait_for_end,
    wait_for_matrices,
    write_llama,
)

from pissa_core.adapters import open_sink, open_source
from pissa_core.engine import convert
from pissa_core.errors import FolderNotFound, NothingMatched
from pissa_core.refs import LocalRef
from pissa_core.runtime import Runtime
from worker.contract import BaseToPissa, Job
from worker.store import JobStore
from worker.terms import Phase, Status


@pytest.fixture
def model(service: Service, tmp_path: Path) -> Path:
    return write_llama(service.root / tmp_path.name / "model")


def run(store: JobStore, body: BaseToPissa) -> Job:
    return wait_for_end(store, store.submit(body, owner="me")[0].id)


def failure(service: Service, body: BaseToPissa) -> str:
    job = run(service.store, body)
    assert job.status is Status.FAILED
    assert job.error is not None
    return job.error.code


def test_a_job_gives_the_same_bytes_as_the_command(service: Service, model: Path) -> None:
    body = request(model, model.parent / "out")
    job = run(service.store, body)
    assert (job.status, job.phase) == (Status.SUCCEEDED, Phase.DONE)
    alone = model.parent / "alone"
    sink = open_sink(LocalRef(str(alone)), digest="alone")
    for _ in convert(open_source(LocalRef(str(model))), sink, body.pissa, Runtime("cpu", slots=1)):
        pass
    assert checksums(model.parent / "out") == checksums(alone)
    assert leftovers(model.parent) == []


def test_the_result_says_what_was_done(service: Service, model: Path) -> None:
    job = run(service.store, request(model, model.parent / "out"))
    result = job.result
    assert result is not None
    assert result["output"] == str(model.parent / "out")
    assert result["manifest"] == f"/v1/jobs/{job.id}/manifest"
    assert (result["matrices"], result["passed"]) == (14, None)
    assert 0 < result["energy"] < 1
    assert result["max_recombination_error"] < 1e-6
    # Less than the import of torch alone cannot be; more than a few gigabytes is not this model.
    assert 50e6 < result["peak_memory_bytes"] < 4e9
    assert {"planning", "shards", "publishing"} <= set(result["phase_seconds"])
    assert job.progress.model_dump() == {
        "matrices": {"done": 14, "total": 14},
        "shards": {"done": 3, "total": 3},
        "bytes": {"done": job.progress.bytes.total, "total": job.progress.bytes.total},
    }
    published = json.loads((model.parent / "out" / "pissa_manifest.json").read_text())
    assert service.store.manifest(job.id) == published


def test_without_an_output_the_service_keeps_the_files(service: Service, model: Path) -> None:
    job = run(service.store, request(model))
    assert job.result is not None
    assert job.result["output"] is None
    kept = service.settings.files_dir / job.id
    with safe_open(kept / "pissa_init" / "adapter_model.safetensors", "np") as adapter:
        assert len(list(adapter.keys())) == 28
    service.store.delete(job.id)
    assert not kept.exists()
    assert leftovers(service.settings.files_dir) == []


def test_events_tell_the_whole_way(service: Service, model: Path) -> None:
    job = run(service.store, request(model, model.parent / "out"))
    kinds = [event.type.value for event in service.store.events(job.id)[0]]
    assert kinds[:3] == ["queued", "started", "planned"]
    assert kinds[-2:] == ["publishing", "succeeded"]
    assert [kinds.count(kind) for kind in ("shard_started", "matrix_done", "shard_done")] == [
        3, 14, 3,
    ]  # fmt: skip


def test_a_job_tells_what_has_no_effect(service: Service, model: Path) -> None:
    job = run(service.store, request(model, target_modules=["q_proj", "k_porj"]))
    planned = [event for event in service.store.events(job.id)[0] if event.type == "planned"]
    assert job.result is not None
    assert "no module is named 'k_porj'" in job.result["notes"][0]
    assert planned[0].data["notes"] == job.result["notes"]


def test_a_plan_is_made_without_a_job(service: Service, model: Path) -> None:
    plan_id = service.store.request_plan(request(model), hub_token=None)
    plan = service.store.plan_result(plan_id, timeout_s=60)
    assert plan["source"] == str(model)
    assert len(plan["matrices"]) == 14


def test_a_plan_that_cannot_be_made_says_why(service: Service, model: Path) -> None:
    for body, error in [
        (request(model.parent / "missing"), FolderNotFound),
        (request(model, target_modules=["nothing"]), NothingMatched),
    ]:
        plan_id = service.store.request_plan(body, hub_token=None)
        with pytest.raises(error):
            service.store.plan_result(plan_id, timeout_s=60)


def test_what_cannot_be_done_fails_with_its_code_and_leaves_nothing(
    service: Service, model: Path
) -> None:
    out = model.parent / "out"
    full = model.parent / "full"
    full.mkdir()
    (full / "mine").write_text("here first")
    assert failure(service, request(model.parent / "missing", out)) == "folder_not_found"
    assert failure(service, request(model, out, rank=999)) == "rank_too_large"
    assert failure(service, request(model, out, target_modules=["no"])) == "nothing_matched"
    assert failure(service, request(model, full)) == "output_exists"
    assert failure(service, request(model, model / "out")) == "output_inside_source"
    assert not out.exists()
    assert leftovers(model.parent) == []


def test_a_bad_matrix_is_named_and_staged_work_goes(service: Service, model: Path) -> None:
    shard = model / "model-00003-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    with safe_open(shard, "np") as tensors:
        name = next(key for key in tensors.keys() if "up_proj" in key)  # noqa: SIM118
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    begin = 8 + int.from_bytes(content[:8], "little") + header[name]["data_offsets"][0]
    content[begin : begin + 4] = b"\x00\x00\xc0\x7f"
    shard.write_bytes(content)
    job = run(service.store, request(model, model.parent / "out"))
    assert job.error is not None
    assert (job.status, job.error.code) == (Status.FAILED, "non_finite_weight")
    assert name in job.error.message
    assert [path.name for path in model.parent.iterdir()] == ["model"]


@pytest.mark.slow
def test_a_hub_that_is_away_is_tried_again_before_the_job_fails(service: Service) -> None:
    job = run(service.store, BaseToPissa(model="org/nowhere"))
    assert job.error is not None
    assert job.error.code == "hub_unavailable"
    waits = [e for e in service.store.events(job.id)[0] if e.type.value == "waiting"]
    # The others are the pauses within an attempt.
    retries = [wait for wait in waits if wait.data["delay_s"] == service.settings.retry_s]
    assert len(retries) == service.settings.max_retries
    assert job.attempts == 1 + len(retries)


def test_cancelling_stops_between_matrices_and_a_resume_goes_on(
    service: Service, tmp_path: Path
) -> None:
    model = write_llama(service.root / tmp_path.name / "m", layers=4, hidden=320, shards=1)
    body = request(model, model.parent / "out", svd={"method": "exact"})
    job_id = service.store.submit(body, owner="me")[0].id
    wait_for_matrices(service.store, job_id, 3)
    cancelling = service.store.cancel(job_id, discard=False)
    assert cancelling.status in (Status.CANCELLING, Status.CANCELLED)
    cancelled = wait_for_end(service.store, job_id)
    assert cancelled.status is Status.CANCELLED
    assert cancelled.progress.matrices.done < 28
    assert not (model.parent / "out").exists()
    service.store.resume(job_id, hub_token=None)
    done = wait_for_end(service.store, job_id)
    assert (done.status, done.attempts) == (Status.SUCCEEDED, 2)


def test_discarding_leaves_nothing(service: Service, tmp_path: Path) -> None:
    model = write_llama(service.root / tmp_path.name / "m", layers=4, hidden=320, shards=4)
    body = request(model, model.parent / "out", svd={"method": "exact"})
    job_id = service.store.submit(body, owner="me")[0].id
    wait_for_matrices(service.store, job_id, 9)
    service.store.cancel(job_id, discard=True)
    assert wait_for_end(service.store, job_id).status is Status.CANCELLED
    assert [path.name for path in model.parent.iterdir()] == ["m"]


def test_the_worker_says_who_it_is(service: Service) -> None:
    [worker] = service.store.workers()
    assert worker.name.startswith("cpu-")
    assert worker.device == "cpu"
    assert not worker.busy


def test_the_compute_node_never_loads_transformers(service: Service, model: Path) -> None:
    run(service.store, request(model))
    name = service.store.workers()[0].name
    pid = int(name.partition("@")[0].rpartition("-")[2])
    loaded: dict[str, str] = {}
    for node in psutil.Process(pid).children(recursive=True):
        role = node.environ()["PISSA_NODE_ROLE"]
        loaded[role] = loaded.get(role, "") + Path(f"/proc/{node.pid}/maps").read_text()
    # The binary libraries tell: safetensors' is the engine's, tokenizers' is transformers' alone.
    assert "/torch/" in loaded["compute"]
    assert "/tokenizers/" in loaded["planner"]
    assert "/tokenizers/" not in loaded["compute"]
