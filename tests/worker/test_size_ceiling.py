"""The operator's ceiling on model size: a job that names a larger checkpoint fails, a plan too."""

from __future__ import annotations

from pathlib import Path

import pytest
from worker_tools import request, write_llama

from pissa_core.errors import InvalidRequest
from pissa_core.runtime import Runtime
from worker.contract import Status
from worker.runner import carry_out
from worker.settings import Settings
from worker.store import JobStore, TaskStore
from worker.vault import open_vault
from worker.wiring import Context


@pytest.fixture
def model(local_root: Path) -> Path:
    return write_llama(local_root / "model", layers=1)


def context(settings: Settings, tasks: TaskStore, ceiling: int) -> Context:
    limited = settings.model_copy(update={"max_model_size": ceiling})
    return Context(tasks, open_vault(settings), limited, Runtime(device="cpu", slots=1))


def weights(model: Path) -> int:
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


def test_a_job_with_a_larger_checkpoint_fails_with_both_numbers(
    store: JobStore, tasks: TaskStore, settings: Settings, model: Path
) -> None:
    job, _ = store.submit(request(model), owner="me")
    carry_out(context(settings, tasks, weights(model) - 1), job.id, "prepare")
    failed = store.get(job.id)
    assert failed.status is Status.FAILED
    assert failed.error is not None
    assert failed.error.code == "invalid_request"
    assert f"{weights(model)} bytes" in failed.error.message
    assert f"the {weights(model) - 1} that" in failed.error.message
    assert failed.error.hint


def test_a_job_of_that_size_goes_on(
    store: JobStore, tasks: TaskStore, settings: Settings, model: Path
) -> None:
    job, _ = store.submit(request(model), owner="me")
    carry_out(context(settings, tasks, weights(model)), job.id, "prepare")
    assert store.get(job.id).progress.shards.total == 3


def test_a_plan_of_a_larger_checkpoint_is_refused(
    store: JobStore, tasks: TaskStore, settings: Settings, model: Path
) -> None:
    plan = store.request_plan(request(model), hub_token=None)
    carry_out(context(settings, tasks, 1000), plan, "plan")
    with pytest.raises(InvalidRequest, match="more than the 1000 that this service takes"):
        store.plan_result(plan, timeout_s=1)
