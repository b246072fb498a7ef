"""pissa-to-base and verify by REST: the API, Valkey, Celery worker processes, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Service
from safetensors.numpy import load_file, save_file
from starlette.testclient import TestClient
from worker_tools import leftovers, request, wait_for_end, write_llama

from app.factory import create_app
from worker.terms import Status

FIGURES = {"matrices", "energy", "max_missed", "max_recombination_error", "passed"}


@pytest.fixture(scope="module")
def api(service: Service) -> TestClient:
    """The API over the service's store, which its real worker serves."""
    return TestClient(create_app(service.settings, service.store), base_url="http://127.0.0.1")


@pytest.fixture(scope="module")
def pair(service: Service) -> tuple[Path, Path]:
    """A model below the service's root, and its PiSSA form beside it."""
    model = write_llama(service.root / "way-back" / "model")
    output = model.parent / "pair"
    job = service.store.submit(request(model, output), owner="")[0]
    assert wait_for_end(service.store, job.id).status is Status.SUCCEEDED
    return model, output


def run(api: TestClient, service: Service, **body: Any) -> dict[str, Any]:
    answer = api.post("/v1/jobs", json=body)
    assert answer.status_code == 202, answer.text
    wait_for_end(service.store, answer.json()["id"])
    job: dict[str, Any] = api.get(f"/v1/jobs/{answer.json()['id']}").json()
    return job


def types_of_events(api: TestClient, job: dict[str, Any]) -> list[str]:
    accept = {"Accept": "application/json"}
    events = api.get(f"/v1/jobs/{job['id']}/events", headers=accept).json()["events"]
    return [event["type"] for event in events]


def test_a_residual_and_its_initial_adapter_become_the_original(api, service, pair):
    model, output = pair
    job = run(
        api,
        service,
        kind="pissa-to-base",
        residual=str(output),
        adapter=str(output / "pissa_init"),
        output=str(model.parent / "back"),
    )
    assert (job["status"], job["error"]) == ("succeeded", None)
    result = job["result"]
    assert result.keys() >= FIGURES
    assert result["output"] == str(model.parent / "back")
    assert result["weights"] > result["equal_weights"] > 0
    assert 0 < result["max_recombination_error"] < 1e-6
    assert (result["energy"], result["passed"]) == (None, None)
    assert job["progress"]["matrices"] == {"done": 14, "total": 14}
    manifest = api.get(f"/v1/jobs/{job['id']}/manifest").json()
    assert manifest == json.loads((model.parent / "back/pissa_manifest.json").read_text())
    assert manifest["kind"] == "pissa-to-base"
    assert types_of_events(api, job).count("matrix_done") == 14
    assert leftovers(model.parent) == []
    for shard in model.glob("*.safetensors"):
        wanted, found = load_file(shard), load_file(model.parent / "back" / shard.name)
        for name, value in wanted.items():
            assert abs(found[name] - value).max() <= 1e-6


def test_a_plain_model_may_be_kept_by_the_service(api, service, pair):
    _, output = pair
    job = run(
        api, service, kind="pissa-to-base", residual=str(output), adapter=f"{output}/pissa_init"
    )
    assert job["result"]["output"] is None
    files = {entry["path"] for entry in api.get(f"/v1/jobs/{job['id']}/files").json()["files"]}
    assert "pissa_manifest.json" in files
    assert not any(path.startswith("pissa_init") for path in files)


def test_a_pair_that_does_not_belong_fails_with_its_code(api, service, pair):
    model, output = pair
    job = run(
        api,
        service,
        kind="pissa-to-base",
        residual=str(model),
        adapter=str(output / "pissa_init"),
        output=str(model.parent / "never"),
    )
    assert (job["status"], job["error"]["code"]) == ("failed", "wrong_base")
    assert str(output) in job["error"]["message"]
    assert not (model.parent / "never").exists()
    assert leftovers(model.parent) == []


def test_a_good_pair_passes(api, service, pair):
    model, output = pair
    job = run(api, service, kind="verify", original=str(model), converted=str(output))
    assert (job["status"], job["error"]) == ("succeeded", None)
    result = job["result"]
    assert result.keys() >= FIGURES
    assert (result["passed"], result["faults"], result["matrices"]) == (True, 0, 14)
    assert 0 < result["energy"] < 1
    assert result["output"] is None
    report = api.get(f"/v1/jobs/{job['id']}/manifest").json()
    assert (report["kind"], report["passed"]) == ("verify", True)
    assert len(report["matrices"]) == 14
    assert [check["passed"] for check in report["checks"]] == [True] * len(report["checks"])
    progress = job["progress"]
    assert progress["shards"] == {"done": 5, "total": 5}  # three shards, the adapter, the rest
    assert progress["bytes"]["done"] == progress["bytes"]["total"]
    assert api.get(f"/v1/jobs/{job['id']}/files").json() == {"files": []}


def test_a_job_that_finds_a_fault_has_succeeded(api, service, pair, tmp_path):
    model, output = pair
    shard = output / "model-00002-of-00003.safetensors"
    before = shard.read_bytes()
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("proj.weight"))
    tensors[name] = tensors[name] * 1.01
    try:
        save_file(tensors, shard, metadata={"format": "pt"})
        job = run(api, service, kind="verify", original=str(model), converted=str(output))
    finally:
        shard.write_bytes(before)
    assert (job["status"], job["result"]["passed"]) == ("succeeded", False)
    report = api.get(f"/v1/jobs/{job['id']}/manifest").json()
    faults = [fault for check in report["checks"] for fault in check["faults"]]
    assert {"files", "targets", "figures"} <= {fault["check"] for fault in faults}
    assert any(fault["where"] == name.removesuffix(".weight") for fault in faults)


def test_an_original_that_is_not_there_is_an_error(api, service, pair):
    model, output = pair
    job = run(api, service, kind="verify", original=f"{model}-gone", converted=str(output))
    assert (job["status"], job["error"]["code"]) == ("failed", "folder_not_found")
