"""Jobs over REST from Hub to Hub: workers on two machines, one of which dies; stock PEFT loads."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
import torch
from hub.faults import Fault
from hub.server import running
from hub.state import Hub
from pydantic import SecretStr
from service_fixtures import quick_settings
from starlette.testclient import TestClient
from worker_tools import kill_tree, running_worker, wait_for, write_llama

from app.factory import create_app
from worker.connect import open_store
from worker.embedded import embedded_valkey

IN, OUT = "someone/llama", "somebody/out"
BODY = {
    "model": IN,
    "output": {"ref": f"hf://{OUT}", "private": True, "commit_message": "Made by a job"},
    "pissa": {"rank": 4, "svd": {"method": "exact"}},
}
MORE = """
import json, torch
ids = torch.arange(1, 9)[None]
print(json.dumps(model(input_ids=ids).logits.detach().flatten().tolist()))
"""


@dataclass(frozen=True)
class Service:
    """An API, its store, two workers that share no disk, and a Hub."""

    api: TestClient
    store_url: str
    hub: Hub
    token: str
    first: psutil.Process
    folder: Path

    def submit(self, **changes: Any) -> str:
        answer = self.api.post(
            "/v1/jobs", json={**BODY, **changes}, headers={"X-Hub-Token": self.token}
        )
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.api.get(f"/v1/jobs/{job_id}").json()
        return found

    def ended(self, job_id: str) -> dict[str, Any]:
        final = ("succeeded", "failed", "cancelled")

        def look() -> dict[str, Any] | None:
            job = self.job(job_id)
            return job if job["status"] in final else None

        return wait_for(look, f"the end of {job_id}")

    def events(self, job_id: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.api.get(
            f"/v1/jobs/{job_id}/events", headers={"Accept": "application/json"}
        ).json()["events"]
        return found

    def shown(self) -> dict[str, str]:
        files = self.hub.repos[OUT].resolve("main").files
        return {
            path: hashlib.sha256(file.blob.read(0, file.size)).hexdigest()
            for path, file in files.items()
        }


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("hub-to-hub")
    model = write_llama(folder / "model", layers=3, hidden=256, shards=4)
    with running(Hub()) as hub, embedded_valkey(folder / "store") as url:
        hub.create_repo(IN, model, private=True).readers.add("somebody")
        token = hub.create_token("somebody")
        key = SecretStr("one key for all")
        machines = [
            quick_settings(url, folder / name, folder).model_copy(
                update={"secret_key": key, "local_root": None}
            )
            for name in ("api", "first", "second")
        ]
        logs = [folder / f"{name}.log" for name in ("first", "second")]
        store = open_store(machines[0])
        with (
            running_worker(machines[1], logs[0], hub=hub.endpoint) as first,
            running_worker(machines[2], logs[1], hub=hub.endpoint),
        ):
            for log in logs:
                wait_for(lambda log=log: log.read_text().count("ready.") == 2, "both nodes")
            api = TestClient(create_app(machines[0], store), base_url="http://127.0.0.1")
            with api:
                yield Service(api, url, hub, token, psutil.Process(first.pid), folder)
        store.close()


@pytest.fixture(scope="module")
def undisturbed(service: Service) -> dict[str, str]:
    """What a job shows that nothing happens to; its repo is gone again."""
    job = service.ended(service.submit())
    assert job["status"] == "succeeded", job["error"]
    assert job["result"]["output"] == f"hf://{OUT}@{service.hub.repos[OUT].branches['main']}"
    shown = service.shown()
    del service.hub.repos[OUT]
    return shown


def test_a_machine_dies_and_another_goes_on_with_nothing_of_its_disk(service, undisturbed):
    hub = service.hub
    job_id = service.submit()

    def sealed() -> list[str]:
        done = [event for event in service.events(job_id) if event["type"] == "shard_done"]
        return [event["data"]["shard"] for event in done]

    done = wait_for(sealed, "a sealed shard")
    kill_tree(service.first.pid)
    assert len(done) < 4
    before = {path: hub.sent_bytes(f"{IN}/{path}") for path in done}
    assert hub.repos[OUT].resolve("main").files.keys() <= {".gitattributes"}
    job = service.ended(job_id)
    assert job["status"] == "succeeded", job["error"]
    assert service.shown() == undisturbed
    assert {path: hub.sent_bytes(f"{IN}/{path}") for path in done} == before
    assert list(hub.repos[OUT].branches) == ["main"]
    assert hub.repos[OUT].private
    assert hub.repos[OUT].history("main")[0].title == "Made by a job"
    # Each once for this job and once for the one before, whose repo is gone.
    assert max(hub.uploads.finished.values()) <= 2
    assert not list((service.folder / "second" / "scratch").glob("*/*/*"))


def test_the_card_of_the_repo_loads_it(service, undisturbed, tmp_path):
    hub = service.hub
    if OUT not in hub.repos:
        assert service.ended(service.submit())["status"] == "succeeded"
    card = hub.repos[OUT].resolve("main").files["README.md"].blob
    text = card.read(0, card.size).decode()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_TOKEN": service.token}
    done = subprocess.run(
        [sys.executable, "-c", code + MORE],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(service.folder / "model")
    wanted = original(input_ids=torch.arange(1, 9)[None]).logits.detach().flatten()
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    metadata = text.split("---")[1]
    assert f"base_model: {IN}" in metadata
    assert "base_model_relation: finetune" in metadata


def test_a_job_says_that_it_waits_and_its_token_is_found_nowhere(service, undisturbed):
    hub, token = service.hub, service.token
    hub.repos.pop(OUT, None)
    hub.faults.add(Fault("/commit/main$", "POST", status=429, headers={"Retry-After": "2"}))
    # What cannot be swept is logged with its traceback.
    hub.faults.add(Fault("/branch/pissa-staging-", "DELETE", times=9, status=403))
    job_id = service.submit()
    wait_for(lambda: service.job(job_id)["phase"] == "waiting", "the phase waiting")
    job = service.ended(job_id)
    assert job["status"] == "succeeded"
    assert service.shown() == undisturbed
    waits = [event["data"] for event in service.events(job_id) if event["type"] == "waiting"]
    assert [wait["code"] for wait in waits] == ["rate_limited"]
    assert waits[0]["delay_s"] == 2
    hub.faults.clear()

    failing = service.submit(output="hf://nobody/out")
    assert service.ended(failing)["error"]["code"] == "no_write_access"
    answers = [
        service.api.get(f"/v1/jobs/{each}{what}").text
        for each in (job_id, failing)
        for what in ("", "/manifest", "/files")
    ]
    told = [*answers, json.dumps(service.events(job_id) + service.events(failing))]
    assert "Traceback" in (service.folder / "second.log").read_text()
    files = [path for path in service.folder.rglob("*") if path.is_file()]
    blobs = [
        file.blob.read(0, file.size)
        for repo in hub.repos.values()
        for commit in repo.commits.values()
        for file in commit.files.values()
    ]
    held = [text.encode() for text in told] + _dump(service.store_url) + blobs
    held += [path.read_bytes() for path in files]
    assert len(files) > 10
    assert not [content[:80] for content in held if token.encode() in content]
    # Not even sealed, once the job has ended.
    client = redis.Redis.from_url(service.store_url)
    assert not [each for each in (job_id, failing) if client.hget(f"pissa:job:{each}", "token")]
    client.close()


def test_a_cancelled_job_keeps_what_it_sealed_until_that_is_discarded(service, undisturbed):
    hub, headers = service.hub, {"X-Hub-Token": service.token}
    hub.repos.pop(OUT, None)
    hub.faults.add(Fault("/commit/main$", "POST", times=10**6, status=503))
    job_id = service.submit()
    for discard, kept in ((False, 1), (True, 0)):
        wait_for(lambda: service.job(job_id)["phase"] == "waiting", "the phase waiting")
        cancelled = service.api.post(f"/v1/jobs/{job_id}/cancel", json={"discard": discard})
        assert cancelled.status_code == 202
        assert service.ended(job_id)["status"] == "cancelled"
        staging = [name for name in hub.repos[OUT].branches if name.startswith("pissa-staging-")]
        assert len(staging) == kept
        assert hub.repos[OUT].resolve("main").files.keys() == {".gitattributes"}
        again = service.api.post(f"/v1/jobs/{job_id}/resume", json={}, headers=headers)
        assert again.status_code == 202
    hub.faults.clear()
    assert service.ended(job_id)["status"] == "succeeded"
    assert service.shown() == undisturbed


@pytest.mark.slow
def test_the_command_publishes_a_folder_on_a_branch(service, tmp_path):
    hub = service.hub
    command = [sys.executable, "-m", "app.cli", "convert", str(service.folder / "model")]
    command += ["--out", "somebody/cli", "--branch", "r4", "--private", "--rank", "4", "--json"]
    environment = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": service.token,
        "PISSA_DATA_DIR": str(tmp_path / "data"),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    repo = hub.repos["somebody/cli"]
    assert json.loads(done.stdout)["output"] == f"hf://somebody/cli@{repo.branches['r4']}"
    assert repo.private
    config = repo.resolve("r4").files["pissa_init/adapter_config.json"].blob
    adapter = json.loads(config.read(0, config.size))
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("somebody/cli", "r4")
    assert repo.resolve("main").files.keys() == {".gitattributes"}
    again = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert again.returncode == 1
    assert "error[output_exists]" in again.stderr
    assert service.token not in done.stdout + done.stderr + again.stdout + again.stderr


def _dump(url: str) -> list[bytes]:
    client = redis.Redis.from_url(url)
    found = [dumped for key in client.scan_iter() if (dumped := client.dump(key)) is not None]
    client.close()
    assert found
    return found
