"""How long a worker waits for a Hub that asks it to: in a job as told, in a plan hardly at all."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hub.faults import Fault
from hub.state import Hub
from store_tools import REQUEST, take

from pissa_core.errors import RateLimited
from pissa_core.runtime import Runtime
from worker.settings import Settings
from worker.store import JobStore, TaskStore
from worker.vault import open_vault
from worker.wiring import Context


def test_a_job_waits_as_long_as_it_is_told_and_a_plan_does_not(
    hub: Hub,
    store: JobStore,
    tasks: TaskStore,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("pissa_core.leaving.time", SimpleNamespace(sleep=slept.append))
    monkeypatch.setattr("pissa_core.adapters.hub.client.ENDPOINT", hub.endpoint)
    hub.create_repo("org/name", files={"config.json": b"{}"})
    context = Context(tasks, open_vault(settings), settings, Runtime(device="cpu", slots=1))
    job, _ = store.submit(REQUEST, owner="me")
    claim = take(tasks, job.id, "prepare")
    wait = Fault("/api/models/org/name", status=429, headers={"Retry-After": "60"})
    hub.faults.add(wait)
    assert context.source(claim, "org/name").files()
    assert slept == [60]
    hub.faults.add(replace(wait, times=1))
    with pytest.raises(RateLimited, match="60 s"):
        context.source(replace(claim, task="plan"), "org/name")
    assert slept == [60]
