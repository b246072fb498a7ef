"""Checkpoints made to order, real worker processes, and looking at what they left."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil
from safetensors.numpy import save_file

from worker.contract import BaseToPissa, Job
from worker.settings import Settings
from worker.store import JobStore
from worker.terms import Status

PATIENCE_S = 90.0
NO_HUB = "http://127.0.0.1:9"
"""A port that nothing listens on: no test may reach a Hub it has not started."""
Found = TypeVar("Found")


def write_llama(folder: Path, *, layers: int = 2, hidden: int = 32, shards: int = 3) -> Path:
    """Write a Llama checkpoint of seven matrices a layer, without loading transformers."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 64,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    names = list(_tensors(layers, hidden))
    size = -(-len(names) // shards)
    random = np.random.default_rng(0)
    weight_map = {}
    for index in range(shards):
        path = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        chosen = names[index * size : (index + 1) * size]
        tensors = {
            name: random.standard_normal(shape, dtype=np.float32) * 0.1 for name, shape in chosen
        }
        save_file(tensors, folder / path, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path)
    index_text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index_text)
    return folder


def _tensors(layers: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (64, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{prefix}.self_attn.{name}.weight", (hidden, hidden)
        yield f"{prefix}.mlp.gate_proj.weight", (2 * hidden, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (2 * hidden, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, 2 * hidden)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (64, hidden)


@contextmanager
def running_worker(
    settings: Settings, log: Path, *, hub: str = NO_HUB
) -> Iterator[subprocess.Popen[bytes]]:
    """Run one worker, as an operator would, and end it with everything it started."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker", "--device", "cpu", "--slots", "1"],
            env=os.environ | settings.as_env() | {"HF_ENDPOINT": hub},
            stderr=output,
            stdout=output,
        )
    try:
        yield process
    finally:
        kill_tree(process.pid, signal.SIGCONT)
        process.terminate()
        process.wait(30)


def kill_tree(pid: int, signum: int = signal.SIGKILL) -> None:
    """Send a signal to a process of ours and to all below it."""
    try:
        parent = psutil.Process(pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.send_signal(signum)
        except psutil.NoSuchProcess:
            continue


def wait_for(look: Callable[[], Found | None], what: str, patience_s: float = PATIENCE_S) -> Found:
    """Return what `look` finds, once it finds something."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {patience_s:g} s in vain for {what}")


def wait_for_end(store: JobStore, job_id: str) -> Job:
    """Wait until a job has ended."""

    def ended() -> Job | None:
        job = store.get(job_id)
        return job if job.status.final else None

    return wait_for(ended, f"the end of {job_id}")


def wait_for_status(store: JobStore, job_id: str, status: Status) -> Job:
    """Wait until a job is in a state."""

    def there() -> Job | None:
        job = store.get(job_id)
        return job if job.status is status else None

    return wait_for(there, f"{job_id} to be {status}")


def wait_for_matrices(store: JobStore, job_id: str, count: int) -> Job:
    """Wait until a job has done some matrices."""

    def done() -> Job | None:
        job = store.get(job_id)
        assert job.status is not Status.FAILED, job.error
        return job if job.progress.matrices.done >= count else None

    return wait_for(done, f"{count} matrices of {job_id}")


def request(model: Path, output: Path | None = None, **config: object) -> BaseToPissa:
    """Ask for a conversion of a local folder."""
    config = {"rank": 4, **config}
    body = {"model": str(model), "pissa": config}
    if output is not None:
        body["output"] = str(output)
    return BaseToPissa.model_validate(body)


def checksums(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file, but for the one field that names the output itself."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(_comparable(path, folder)).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _comparable(path: Path, folder: Path) -> bytes:
    content = path.read_bytes()
    if path.name == "adapter_config.json":
        return content.replace(str(folder).encode(), b"OUTPUT")
    if path.name == "pissa_manifest.json":
        manifest = json.loads(content)
        manifest["files"].pop("pissa_init/adapter_config.json", None)
        return json.dumps(manifest, sort_keys=True).encode()
    return content


def leftovers(folder: Path) -> list[str]:
    """Return what work in progress has left behind."""
    return [path.name for path in folder.iterdir() if ".pissa-staging-" in path.name]
