"""Giants of the test Hub: real headers and checksums over bytes that nobody keeps."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hub.giants import Checksums, Llama, Weights, weights_of
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from safetensors import safe_open

HUB = Path(__file__).resolve().parent.parent / "hub"
SMALL = Llama().scaled(128)


def test_a_llama_3_70b_has_its_thirty_shards():
    files = Llama().files()
    shards = [blob for path, blob in files.items() if path.endswith(".safetensors")]
    assert len(shards) == 30
    assert 141.1e9 < sum(blob.size for blob in shards) < 141.2e9
    assert max(blob.size for blob in shards) < 5.01e9


def test_any_range_is_that_of_the_whole():
    blob = weights_of({"a": (5000, 7001), "b": (1 << 15, 1 << 10)})
    whole = blob.read(0, blob.size)
    assert len(whole) == blob.size
    for start, stop in ((0, 8), (5, 400), (100, 100), (3, 70_000_001), (blob.size - 9, blob.size)):
        assert blob.read(start, stop) == whole[start:stop]
    assert blob.sha256 == hashlib.sha256(whole).hexdigest()


def test_the_noise_has_no_repeating_rows_and_is_finite(tmp_path):
    import torch

    blob = weights_of({"w": (8192, 8192)})
    (tmp_path / "w.safetensors").write_bytes(blob.read(0, blob.size))
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        W = file.get_tensor("w")
    assert W.dtype == torch.bfloat16
    assert W.isfinite().all()
    # The noise comes again after 2^25 + 1 numbers: 4096 rows further down and one to the left.
    assert not torch.equal(W[:4096], W[4096:])
    assert torch.linalg.matrix_rank(W[:: 4096 // 64, :1024].float()) == 128


def test_checksums_are_taken_once(tmp_path, monkeypatch):
    kept = Checksums(tmp_path / "kept.json")
    first = SMALL.files(kept)
    monkeypatch.setattr(Weights, "checksum", None)
    again = SMALL.files(kept)
    assert {path: blob.sha256 for path, blob in first.items()} == {
        path: blob.sha256 for path, blob in again.items()
    }


@pytest.fixture
def program(tmp_path):
    """Run the Hub as a program; yield its address."""
    options = ["--giant", "big/llama", "--scale", "128", "--token", "me=hf_mine"]
    options += ["--swallow-from", "1000", "--cross-repo", "--storage", str(tmp_path / "storage")]
    process = subprocess.Popen(
        [sys.executable, str(HUB), *options], stdout=subprocess.PIPE, text=True
    )
    yield process.stdout.readline().strip()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    process.stdout.close()


def test_the_program_serves_a_giant_and_counts(program, tmp_path):
    import httpx2

    api = HfApi(endpoint=program, token="hf_mine")
    path = "model-00001-of-00030.safetensors"
    fetched = Path(hf_hub_download("big/llama", path, endpoint=program, local_dir=tmp_path))
    info = {entry.path: entry for entry in api.list_repo_tree("big/llama")}
    assert hashlib.sha256(fetched.read_bytes()).hexdigest() == info[path].lfs.sha256
    index = json.loads(
        Path(
            hf_hub_download(
                "big/llama", "model.safetensors.index.json", endpoint=program, local_dir=tmp_path
            )
        ).read_text()
    )
    with safe_open(fetched, "pt") as file:
        there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    shapes = dict(SMALL.tensors())
    assert there == {name: shapes[name] for name in there}
    assert set(there) == {name for name, shard in index["weight_map"].items() if shard == path}
    assert fetched.stat().st_size > 2 * sum(math.prod(shape) for shape in there.values())
    api.create_repo("me/model")
    content = b"x" * 2000
    operation = CommitOperationAdd("x.safetensors", content)
    api.create_commit("me/model", [operation], commit_message="x")
    counts = httpx2.get(f"{program}/_counts").json()
    checksum = hashlib.sha256(content).hexdigest()
    assert counts["sent"][f"big/llama/{path}"] == fetched.stat().st_size
    assert counts["received"][checksum] == len(content)
    assert counts["uploads"] == {checksum: 1}
    assert counts["commits"] == [["me/model", "main"]]
    assert not any(file.is_file() for file in (tmp_path / "storage").rglob("*"))
