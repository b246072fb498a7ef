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
from worker.contract import Job, JobRequest
from worker.runner import carry_out
from worker.settings import Settings
from worker.store import JobStore, TaskStore
from worker.terms import Status
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


def context(
    settings: Settings, tasks: TaskStore, ceiling: int, max_rank: int | None = None
) -> Context:
    limited = settings.model_copy(update={"max_model_size": ceiling, "max_rank": max_rank})
    return Context(tasks, open_vault(settings), limited, Runtime(device="cpu", slots=1))


def size(model: Path) -> int:
    return sum(path.stat().st_size for path in model.iterdir())


def test_a_job_with_a_larger_checkpoint_fails_with_both_numbers(
    store: JobStore, tasks: TaskStore, settings: Settings, model: Path
) -> None:
    job, _ = store.submit(request(model), owner="me")
    carry_out(context(settings, tasks, size(model) - 1), job.id, "prepare")
    failed = store.get(job.id)
    assert failed.status is Status.FAILED
    assert failed.error is not None
    assert failed.error.code == "invalid_request"
    assert f"{size(model)} bytes" in failed.error.message
    assert f"the {size(model) - 1} that" in failed.error.message
    assert failed.error.hint


def test_a_job_of_that_size_goes_on(
    store: JobStore, tasks: TaskStore, settings: Settings, model: Path
) -> None:
    job, _ = store.submit(request(model), owner="me")
    carry_out(context(settings, tasks, size(model)), job.id, "prepare")
    assert store.get(job.id).progress.shards.total == 3


def test_a_plan_of_a_larger_checkpoint_is_refused(
    store: JobStore, tasks: TaskStore, settings: Settings, model: Path
) -> None:
    plan = store.request_plan(request(model), hub_token=None)
    carry_out(context(settings, tasks, 1000), plan, "plan")
    with pytest.raises(InvalidRequest, match="more than the 1000 that this service takes"):
        store.plan_result(plan, timeout_s=1)


def test_what_goes_along_with_the_weights_counts_too(
    store: JobStore, tasks: TaskStore, settings: Settings, model: Path
) -> None:
    ceiling = size(model)
    (model / "corpus.txt").write_bytes(b"x")
    job, _ = store.submit(request(model), owner="me")
    carry_out(context(settings, tasks, ceiling), job.id, "prepare")
    assert store.get(job.id).status is Status.FAILED


@pytest.fixture
def converted(model: Path) -> Path:
    folder = model.parent / "converted"
    convert_to(model, folder, {"rank": 2})
    return folder


def body_of(kind: str, model: Path, converted: Path) -> JobRequest:
    adapter = str(converted / "pissa_init")
    fields = {
        "verify": {"original": str(model), "converted": str(converted)},
        "pissa-to-base": {"residual": str(converted), "adapter": adapter},
        "pissa-to-lora": {"initial": adapter, "trained": adapter},
    }
    return TypeAdapter(JobRequest).validate_python({"kind": kind, **fields[kind]})


def prepared(context: Context, store: JobStore, body: JobRequest) -> Job:
    job, _ = store.submit(body, owner="me")
    carry_out(context, job.id, "prepare")
    return store.get(job.id)


@pytest.mark.parametrize("kind", ["verify", "pissa-to-base", "pissa-to-lora"])
def test_the_other_kinds_keep_to_the_ceiling_too(
    store: JobStore, tasks: TaskStore, settings: Settings, model: Path, converted: Path, kind: str
) -> None:
    adapter = (converted / "pissa_init/adapter_model.safetensors").stat().st_size
    largest = adapter if kind == "pissa-to-lora" else size(model)
    body = body_of(kind, model, converted)
    refused = prepared(context(settings, tasks, largest - 1), store, body)
    assert refused.status is Status.FAILED
    assert refused.error is not None
    assert f"more than the {largest - 1} that" in refused.error.message
    taken = prepared(context(settings, tasks, largest), store, body)
    assert taken.status is Status.RUNNING, taken.error


@pytest.mark.parametrize("kind", ["verify", "pissa-to-base"])
def test_an_adapter_beside_a_small_model_keeps_to_the_ceiling_too(
    store: JobStore, tasks: TaskStore, settings: Settings, model: Path, converted: Path, kind: str
) -> None:
    """Its checksum is taken while the job is planned: a large one must not be read for that."""
    ceiling = size(model)
    weights = converted / "pissa_init/adapter_model.safetensors"
    weights.write_bytes(bytes(ceiling + 1))
    refused = prepared(context(settings, tasks, ceiling), store, body_of(kind, model, converted))
    assert refused.error is not None
    assert f"{ceiling + 1} bytes to be read, more than the {ceiling}" in refused.error.message


@pytest.mark.parametrize("kind", ["verify", "pissa-to-base", "pissa-to-lora"])
def test_the_adapters_of_the_other_kinds_keep_to_the_highest_rank(
    store: JobStore, tasks: TaskStore, settings: Settings, model: Path, converted: Path, kind: str
) -> None:
    body = body_of(kind, model, converted)
    refused = prepared(context(settings, tasks, 10**9, max_rank=1), store, body)
    assert refused.error is not None
    assert refused.error.code == "invalid_request"
    assert "has rank 2, above 1," in refused.error.message
    taken = prepared(context(settings, tasks, 10**9, max_rank=2), store, body)
    assert taken.status is Status.RUNNING, taken.error
