"""`pissa-to-lora` as a job over REST, done by real worker processes: in folders and on the Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tinymodels
from conversions import checksums, convert_to
from hub.server import running
from hub.state import Hub
from huggingface_hub import snapshot_download
from lora_tools import edit_config, edit_weights, to_lora
from service_fixtures import quick_settings
from starlette.testclient import TestClient
from worker_tools import leftovers, running_worker, wait_for

from app.asgi import make_app
from worker.embedded import embedded_valkey


class Rest:
    """A running service with a worker, a folder that both may touch, and a Hub."""

    def __init__(self, client: TestClient, root: Path, hub: Hub) -> None:
        self.client = client
        self.root = root
        self.hub = hub
        self.token = hub.create_token("somebody", role="write")

    def done(self, **body: Any) -> dict[str, Any]:
        """Submit a job and return it as it ended."""
        answer = self.client.post("/v1/jobs", json=body, headers={"X-Hub-Token": self.token})
        assert answer.status_code == 202, answer.text
        url = answer.headers["Location"]

        def ended() -> dict[str, Any] | None:
            job: dict[str, Any] = self.client.get(url).json()
            return job if job["status"] in ("succeeded", "failed") else None

        return wait_for(ended, f"the end of {url}")


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rest]:
    folder = tmp_path_factory.mktemp("lora-jobs")
    root = folder / "models"
    root.mkdir()
    with running(Hub()) as hub, embedded_valkey(folder / "data") as url:
        settings = quick_settings(url, folder / "data", root)
        log = folder / "worker.log"
        app = make_app(settings)
        with (
            running_worker(settings, log, hub=hub.endpoint),
            TestClient(app, base_url="http://127.0.0.1") as client,
        ):
            wait_for(lambda: log.read_text().count("ready.") == 2, "both nodes")
            yield Rest(client, root, hub)


@pytest.fixture(scope="module")
def trained(rest: Rest) -> Path:
    """A trained adapter below the root, beside its pair and the original."""
    tinymodels.save_model("llama", rest.root / "base")
    convert_to(rest.root / "base", rest.root / "pair", {"rank": 4})
    return train(rest.root / "pair" / "pissa_init", rest.root / "trained")


def train(initial: Path, folder: Path) -> Path:
    """Stand in for a training: every factor moves."""
    shutil.copytree(initial, folder)
    edit_weights(folder, lambda all_: {key: 1.25 * tensor + 0.01 for key, tensor in all_.items()})
    return folder


@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"tolerance": 0.05, "uniform": True}])
def test_a_job_gives_the_same_bytes_as_the_core(rest, trained, tmp_path, options):
    out = rest.root / f"lora-{len(json.dumps(options))}"
    job = rest.done(
        kind="pissa-to-lora", trained=str(trained), output=str(out), lora=options
    )  # the initial adapter is found
    assert job["status"] == "succeeded", job["error"]
    manifest = to_lora(trained, tmp_path / "alone", **options)
    assert checksums(out) == checksums(tmp_path / "alone")
    assert leftovers(rest.root) == []
    assert job["progress"]["matrices"] == {"done": 14, "total": 14}
    assert job["progress"]["bytes"]["done"] == job["progress"]["bytes"]["total"] > 0
    assert job["request"]["lora"] == {"rank": None, "tolerance": None, "uniform": False, **options}
    result = job["result"]
    assert result["output"] == str(out)
    assert result["matrices"] == 14
    assert result["max_lost"] == manifest["totals"]["max_lost"]
    assert result["notes"] == manifest["lineage"]["notes"]
    assert rest.client.get(f"/v1/jobs/{job['id']}/manifest").json() == manifest
    asked = {"Accept": "application/json"}
    page = rest.client.get(f"/v1/jobs/{job['id']}/events", headers=asked)
    events = page.json()["events"]
    kinds = [event["type"] for event in events]
    assert kinds[:4] == ["queued", "started", "planned", "shard_started"]
    assert kinds.count("matrix_done") == 14
    assert kinds[-3:] == ["shard_done", "publishing", "succeeded"]


def test_the_service_keeps_the_files_where_no_output_is_named(rest, trained):
    job = rest.done(
        kind="pissa-to-lora", trained=str(trained), initial=str(rest.root / "pair" / "pissa_init")
    )
    assert job["status"] == "succeeded", job["error"]
    files = rest.client.get(f"/v1/jobs/{job['id']}/files").json()["files"]
    assert [file["path"] for file in files] == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "pissa_manifest.json",
    ]  # fmt: skip
    config = rest.client.get(f"/v1/jobs/{job['id']}/files/adapter_config.json").json()
    assert config["r"] == 8
    assert config["base_model_name_or_path"] == str(rest.root / "base")


@pytest.mark.parametrize("initial", [None, "./pair", "./pair/pissa_init"])
@pytest.mark.parametrize("base", ["./pair", "pair"])
def test_relative_folders_start_at_the_root_whoever_names_them(rest, trained, base, initial):
    """What is asked for, what an adapter calls its base, and what is found beside either."""
    named = rest.root / f"trained-{base.count('/')}-{len(initial or '')}"
    shutil.copytree(trained, named)
    edit_config(named, base_model_name_or_path=base)
    asked = {} if initial is None else {"initial": initial}
    job = rest.done(kind="pissa-to-lora", trained=f"./{named.name}", **asked)
    assert job["status"] == "succeeded", job["error"]
    (note,) = job["result"]["notes"]
    assert note.startswith(f"the original base is {rest.root / 'base'}, ")


def test_what_does_not_belong_together_fails_by_name_and_leaves_nothing(rest, trained, tmp_path):
    other = shutil.copytree(trained, rest.root / "other-alpha")
    edit_config(other, lora_alpha=64)
    job = rest.done(kind="pissa-to-lora", trained=str(other), output=str(rest.root / "never"))
    assert job["status"] == "failed"
    assert job["error"]["code"] == "adapters_do_not_match"
    assert "scaling 16 in the trained adapter and 1 in the initial" in job["error"]["message"]
    job = rest.done(kind="pissa-to-lora", trained=str(rest.root / "base"), initial=str(trained))
    assert job["error"]["code"] == "unsupported_adapter"
    assert not (rest.root / "never").exists()
    assert leftovers(rest.root) == []


def test_from_hub_to_hub_through_nothing_but_the_trained_adapter(rest, tmp_path):
    rest.hub.create_repo("somebody/llama", tinymodels.save_model("llama", tmp_path / "base"))
    made = rest.done(model="somebody/llama", output="hf://somebody/pair", pissa={"rank": 4})
    assert made["status"] == "succeeded", made["error"]
    options = {"endpoint": rest.hub.endpoint, "token": rest.token}
    snapshot_download("somebody/pair", local_dir=tmp_path / "pair", **options)
    rest.hub.create_repo(
        "somebody/trained", train(tmp_path / "pair" / "pissa_init", tmp_path / "trained")
    )
    job = rest.done(
        kind="pissa-to-lora", trained="somebody/trained", output="hf://somebody/lora", lora={}
    )
    assert job["status"] == "succeeded", job["error"]
    snapshot_download("somebody/lora", local_dir=tmp_path / "lora", **options)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    source = json.loads((tmp_path / "pair" / "pissa_manifest.json").read_text())["source"]
    assert config["base_model_name_or_path"] == "somebody/llama"
    assert config["revision"] == source["commit"]
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "base_model: somebody/llama" in card
    assert "base_model_relation: adapter" in card
    assert "Why did my rank double?" in card
    manifest = json.loads((tmp_path / "lora" / "pissa_manifest.json").read_text())
    assert manifest["lineage"]["initial"]["ref"].endswith("/pissa_init")
    here = to_lora(tmp_path / "trained", tmp_path / "alone", tmp_path / "pair")
    weights = "adapter_model.safetensors"
    assert manifest["files"][weights] == here["files"][weights]
