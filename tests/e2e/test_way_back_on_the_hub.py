"""The ways back from Hub to Hub with less disk than a shard takes: killed, resumed, the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import convert_to, fold_to
from disk_tools import assert_same, sampling
from huggingface_hub import snapshot_download
from lora_tools import edit_weights, to_lora
from service_fixtures import quick_settings
from worker_tools import running_worker, wait_for, wait_for_end, write_llama

from worker.connect import open_store
from worker.contract import Job, PissaToBase, PissaToLora
from worker.embedded import embedded_valkey
from worker.terms import Status

pytestmark = pytest.mark.slow

GIANT = "model-00001-of-00001.safetensors"
BUDGET = 9_000_000
SHARD = 4_000_000
ORIGINAL, PAIR, PLAIN = "someone/llama", "me/pair", "me/plain"


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A residual with one file of 21 MB, its largest tensor 2 MB."""
    folder = tmp_path_factory.mktemp("pair")
    write_llama(folder / "model", hidden=512, shards=1)
    convert_to(folder / "model", folder / "pair", {"rank": 4}, slots=1)
    return folder / "pair"


@pytest.fixture(scope="module")
def trained(pair, tmp_path_factory) -> Path:
    """Stands in for a training: every factor has moved."""
    folder = tmp_path_factory.mktemp("trained") / "trained"
    shutil.copytree(pair / "pissa_init", folder)
    edit_weights(folder, lambda all_: {key: 1.25 * tensor + 0.01 for key, tensor in all_.items()})
    return folder


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory) -> Path:
    """The same fold from folder to folder, with no budget."""
    output = tmp_path_factory.mktemp("whole") / "plain"
    fold_to(pair, pair / "pissa_init", output)
    return output


@contextmanager
def folding(hub, token: str, machine: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "app.cli", "to-base", "--residual", PAIR]
    command += ["--adapter", f"hf://{PAIR}/pissa_init", "--out", f"hf://{PLAIN}"]
    command += ["--device", "cpu", "--slots", "1", "--json", *more]
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": token, "PISSA_DATA_DIR": str(machine)}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def sealed_on(hub) -> set[str]:
    """The shards that the staging branch of the output holds."""
    if PLAIN not in hub.repos:
        return set()
    repo = hub.repos[PLAIN]
    (commit,) = [repo.commits[at] for name, at in repo.branches.items() if "staging" in name] or [
        repo.resolve("main")
    ]
    return {path for path in commit.files if path.endswith("/seal.json")}


def test_a_giant_residual_is_killed_and_resumed_on_an_empty_disk(hub, pair, whole, tmp_path):
    from transformers import AutoModelForCausalLM

    hub.create_repo(PAIR, pair)
    token = hub.create_token("me")
    size = (pair / GIANT).stat().st_size
    assert size > 2 * BUDGET
    limits = ["--disk-budget", str(BUDGET), "--max-shard-size", str(SHARD)]
    with sampling(tmp_path, "*/scratch") as samples:
        with folding(hub, token, tmp_path / "first", *limits) as process:
            while process.poll() is None and len(sealed_on(hub)) < 2:
                time.sleep(0.01)
            assert process.poll() is None, process.communicate()
            process.send_signal(signal.SIGKILL)
        process.wait()
        done = sealed_on(hub)
        assert hub.repos[PLAIN].resolve("main").files.keys() <= {".gitattributes"}
        shutil.rmtree(tmp_path / "first")
        before = hub.sent_bytes(f"{PAIR}/{GIANT}")
        with folding(hub, token, tmp_path / "second", *limits) as process:
            said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert json.loads(said)["max_ulps"] is not None  # held against the original
    assert samples.number > 20
    assert 0 < samples.peak <= BUDGET
    assert len(done) >= 2
    assert hub.sent_bytes(f"{PAIR}/{GIANT}") - before < size - SHARD
    assert set(hub.uploads.finished.values()) == {1}
    assert list(hub.repos[PLAIN].branches) == ["main"]
    assert not list((tmp_path / "second" / "scratch").iterdir())
    down = tmp_path / "down"
    snapshot_download(PLAIN, endpoint=hub.endpoint, local_dir=down)
    assert len(list(down.glob("model-*.safetensors"))) > 6
    assert_same(down, whole)
    mine, theirs = map(AutoModelForCausalLM.from_pretrained, (down, whole))
    tokens = torch.arange(12)[None]
    assert torch.equal(mine(tokens).logits, theirs(tokens).logits)


def test_what_can_never_fit_is_refused_before_any_work(hub, pair, tmp_path):
    hub.create_repo(PAIR, pair)
    token = hub.create_token("me")
    with folding(hub, token, tmp_path / "data", "--disk-budget", "2MB") as process:
        said, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "error[disk_too_small]: model-" in errors
    assert "disk budget is 2,000,000" in errors
    assert not said
    assert PLAIN not in hub.repos


def test_jobs_of_both_kinds_keep_to_the_budget_of_their_worker(
    hub, pair, trained, whole, tmp_path, monkeypatch
):
    hub.create_repo(PAIR, pair)
    hub.create_repo("me/trained", trained)
    token, log = hub.create_token("me"), tmp_path / "worker.log"

    monkeypatch.setenv("HF_TOKEN", token)  # the service's own, for jobs that bring none

    def run(store: Any, body: Any, own: str | None) -> Job:
        return wait_for_end(store, store.submit(body, owner="me", hub_token=own)[0].id)

    with embedded_valkey(tmp_path / "data") as url, sampling(tmp_path, "data/scratch") as samples:
        settings = quick_settings(url, tmp_path / "data", tmp_path / "models").model_copy(
            update={"disk_budget": BUDGET, "local_root": None}
        )
        store = open_store(settings)
        with running_worker(settings, log, hub=hub.endpoint):
            wait_for(lambda: log.read_text().count("ready.") == 2, "both nodes")
            plain = {"ref": f"hf://{PLAIN}", "max_shard_size": SHARD}
            initial = f"hf://{PAIR}/pissa_init"
            back = {"residual": PAIR, "adapter": initial, "output": plain}
            folded = run(store, PissaToBase(kind="pissa-to-base", **back), token)
            lora = {"trained": "me/trained", "initial": initial, "output": "hf://me/lora"}
            made = run(store, PissaToLora(kind="pissa-to-lora", **lora), None)
        store.close()
    assert folded.status is Status.SUCCEEDED, folded.error
    assert made.status is Status.SUCCEEDED, made.error
    assert folded.progress.shards.total > 6
    assert 0 < samples.peak <= BUDGET
    assert not list((tmp_path / "data" / "scratch").iterdir())
    for repo, expected in ((PLAIN, whole), ("me/lora", tmp_path / "alone")):
        if not expected.exists():
            to_lora(trained, expected, pair / "pissa_init")
        snapshot_download(repo, endpoint=hub.endpoint, local_dir=tmp_path / repo)
        assert_same(tmp_path / repo, expected)
