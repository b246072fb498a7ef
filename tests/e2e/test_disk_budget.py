"""A giant shard, a tiny disk budget: never exceeded, whatever is killed; the same model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conversions import convert_to
from disk_tools import assert_same, sampling
from huggingface_hub import snapshot_download
from service_fixtures import quick_settings
from worker_tools import running_worker, wait_for, wait_for_end, write_llama

from pissa_core.errors import DiskTooSmall
from worker.connect import open_store
from worker.contract import BaseToPissa
from worker.embedded import embedded_valkey
from worker.terms import Status

BUDGET = 9_000_000
ID = "someone/llama"
OPTIONS = ["--rank", "4", "--device", "cpu", "--slots", "1", "--json"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """One file of 21 MB, its largest tensor 2 MB."""
    folder = write_llama(tmp_path_factory.mktemp("giant") / "model", hidden=512, shards=1)
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    return folder


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    """The conversion of the same model from a folder, with no budget."""
    output = tmp_path_factory.mktemp("whole") / "out"
    convert_to(model, output, {"rank": 4}, slots=1)
    return output


@contextmanager
def converting(hub, output: str, *more: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "app.cli", "convert", ID, "--out", output, *OPTIONS, *more]
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_killed_and_resumed_within_the_budget(hub, model, whole, tmp_path):
    hub.create_repo(ID, model)
    output = tmp_path / "out"
    limits = ["--disk-budget", str(BUDGET), "--max-shard-size", "4MB"]
    with sampling(tmp_path, ".out.pissa-staging-*/work") as samples:
        with converting(hub, str(output), *limits) as process:
            while (
                process.poll() is None and len(list(tmp_path.glob(".out*/sealed/*/seal.json"))) < 3
            ):
                time.sleep(0.01)
            assert process.poll() is None
            process.send_signal(signal.SIGKILL)
        assert not output.exists()
        (sealed,) = (len(list(folder.iterdir())) for folder in tmp_path.glob(".out*/sealed"))
        sent = sum(seen.sent for seen in hub.requests("^/blobs/"))
        with converting(hub, str(output), *limits) as process:
            said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert json.loads(said)["output"] == str(output)
    assert samples.number > 20
    assert 0 < samples.peak <= BUDGET
    assert sealed >= 3
    again = sum(seen.sent for seen in hub.requests("^/blobs/")) - sent
    assert again < (model / "model.safetensors").stat().st_size
    assert len(list(output.glob("model-*.safetensors"))) > 6
    assert_same(output, whole)


@pytest.mark.slow
def test_two_workers_share_the_shards_and_the_budget(hub, model, whole, tmp_path):
    hub.create_repo(ID, model)
    token = hub.create_token("me")
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    with embedded_valkey(tmp_path / "data") as url, sampling(tmp_path, "data/scratch") as samples:
        settings = quick_settings(url, tmp_path / "data", tmp_path / "models").model_copy(
            update={"disk_budget": BUDGET, "local_root": None}
        )
        store = open_store(settings)
        with (
            running_worker(settings, logs[0], hub=hub.endpoint),
            running_worker(settings, logs[1], hub=hub.endpoint),
        ):
            for log in logs:
                wait_for(lambda log=log: log.read_text().count("ready.") == 2, "both nodes")
            output = {"ref": "hf://me/out", "max_shard_size": "4MB"}
            body = BaseToPissa(model=ID, output=output, pissa={"rank": 4})
            job = wait_for_end(store, store.submit(body, owner="me", hub_token=token)[0].id)
        store.close()
    assert job.status is Status.SUCCEEDED, job.error
    assert job.progress.shards.total > 6
    for log in logs:
        assert re.search(r"attempt 1 begins.*shard:|shard:.*attempt 1 begins", log.read_text())
    assert samples.number > 20
    assert 0 < samples.peak <= BUDGET
    assert set(hub.uploads.finished.values()) == {1}
    snapshot_download("me/out", endpoint=hub.endpoint, local_dir=tmp_path / "down")
    assert_same(tmp_path / "down", whole)
    assert not list((tmp_path / "data" / "scratch").iterdir())


def test_stock_libraries_load_what_was_divided(hub, model, whole, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    hub.create_repo(ID, model)
    with converting(hub, str(tmp_path / "out"), "--disk-budget", str(BUDGET)) as process:
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    tokens = torch.arange(12)[None]

    def logits(folder: Path) -> torch.Tensor:
        base = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            return PeftModel.from_pretrained(base, folder, subfolder="pissa_init")(tokens).logits

    assert torch.equal(logits(tmp_path / "out"), logits(whole))


def test_one_tensor_that_does_not_fit_is_refused_with_the_numbers(hub, model, tmp_path):
    hub.create_repo(ID, model)
    with converting(hub, str(tmp_path / "out"), "--disk-budget", "2MB") as process:
        said, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "error[disk_too_small]: model-" in errors
    assert "disk budget is 2,000,000" in errors
    assert not list(tmp_path.iterdir())
    assert not said


def test_a_service_refuses_the_plan_that_its_budget_cannot_hold(hub, model, tmp_path):
    hub.create_repo(ID, model)
    with embedded_valkey(tmp_path / "data") as url:
        settings = quick_settings(url, tmp_path / "data", tmp_path / "models").model_copy(
            update={"disk_budget": 2_000_000, "local_root": None}
        )
        store = open_store(settings)
        with running_worker(settings, tmp_path / "worker.log", hub=hub.endpoint):
            plan = store.request_plan(BaseToPissa(model=ID, pissa={"rank": 4}), hub_token=None)
            with pytest.raises(DiskTooSmall, match=r"model-0.* disk budget is 2,000,000"):
                store.plan_result(plan, timeout_s=60)
        store.close()
