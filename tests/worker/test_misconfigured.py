"""A worker that is set up wrongly fails a job, and throws away nothing of what others have done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from worker_tools import checksums, request, write_llama

from pissa_core.adapters import open_sink, open_source
from pissa_core.engine import convert
from pissa_core.refs import LocalRef
from pissa_core.runtime import Runtime
from worker.runner import carry_out
from worker.settings import Settings
from worker.store import JobStore, TaskStore
from worker.terms import Status
from worker.vault import open_vault
from worker.wiring import Context


def test_a_worker_without_its_device_keeps_what_is_sealed(
    store: JobStore, tasks: TaskStore, settings: Settings, local_root: Path
) -> None:
    model = write_llama(local_root / "model")
    body = request(model, local_root / "out")
    good = Context(tasks, open_vault(settings), settings, Runtime(device="cpu", slots=1))
    wrong = replace(good, runtime=Runtime(device="cuda:99", slots=1))
    job, _ = store.submit(body, owner="me")
    carry_out(good, job.id, "prepare")
    carry_out(good, job.id, "shard:0")
    carry_out(wrong, job.id, "shard:1")
    failed = store.get(job.id)
    assert failed.status is Status.FAILED
    assert failed.error is not None
    assert "no device 'cuda:99'" in failed.error.message
    sealed = list(local_root.glob(".out.pissa-staging-*/sealed/*/seal.json"))
    assert len(sealed) == 1
    store.resume(job.id, hub_token=None)
    done = sealed[0].stat().st_mtime_ns
    for task in ("prepare", "shard:0", "shard:1", "shard:2"):
        carry_out(good, job.id, task)
    assert sealed[0].stat().st_mtime_ns == done
    carry_out(good, job.id, "publish")
    assert store.get(job.id).status is Status.SUCCEEDED
    alone = open_sink(LocalRef(str(local_root / "alone")), digest="alone")
    for _ in convert(open_source(LocalRef(str(model))), alone, body.pissa, good.runtime):
        pass
    assert checksums(local_root / "out") == checksums(local_root / "alone")
