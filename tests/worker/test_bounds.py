"""What a worker refuses to open: more than the operator's ceiling, and folders out of bounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conversions import convert_to
from pydantic import TypeAdapter
from store_tools import take
from worker_tools import request, write_llama

from pissa_core.errors import InvalidRequest, OutsideLocalRoot
from pissa_core.runtime import Runtime
from worker.contract import JobRequest, Status
from worker.runner import carry_out
from worker.settings import Settings
from worker.store import JobStore, TaskStore
from worker.vault import open_vault
from worker.wiring import Context


def test_what_no_request_names_stays_below_the_root_too(
    tasks: TaskStore, store: JobStore, settings: Settings, model: Path, tmp_path: Path
) -> None:
    """An adapter names its base in a file, which no check of the request sees."""
    job, _ = store.submit(request(model), owner="me")
    claim = take(tasks, job.id, "prepare")
    inside = context(settings, tasks, 10**9)
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (model.parent / "link").symlink_to(outside)
    assert inside.source(claim, str(model)).files()
    for path in (str(outside), "/etc", f"{model}/../../elsewhere", str(model.parent / "link")):
        with pytest.raises(OutsideLocalRoot):
            inside.source(claim, path)
    hub_only = replace(inside, settings=settings.model_copy(update={"local_root": None}))
    for path in (str(model), "/etc", "./model", "~", "file:///etc"):
        with pytest.raises(OutsideLocalRoot):
            hub_only.source(claim, path)


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


@pytest.mark.parametrize("kind", ["verify", "pissa-to-base"])
def test_the_other_kinds_keep_to_the_ceiling_too(
    store: JobStore, tasks: TaskStore, settings: Settings, model: Path, kind: str
) -> None:
    converted = model.parent / "converted"
    convert_to(model, converted, {"rank": 2})
    fields = {
        "verify": {"original": str(model), "converted": str(converted)},
        "pissa-to-base": {"residual": str(converted), "adapter": str(converted / "pissa_init")},
    }
    body = TypeAdapter(JobRequest).validate_python({"kind": kind, **fields[kind]})
    for ceiling, status in ((weights(model) - 1, Status.FAILED), (weights(model), Status.RUNNING)):
        job, _ = store.submit(body, owner="me")
        carry_out(context(settings, tasks, ceiling), job.id, "prepare")
        found = store.get(job.id)
        assert found.status is status, found.error
        if found.error is not None:
            assert f"more than the {ceiling} that" in found.error.message
