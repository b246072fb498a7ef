"""Cancelling cuts every kind of job short in the middle of a transfer, and nothing lies about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from conftest import Service
from conversions import convert_to
from hub.faults import Fault
from hub.server import running
from hub.state import Hub
from pydantic import TypeAdapter
from service_fixtures import quick_settings
from worker_tools import running_worker, wait_for, wait_for_end, write_llama

from worker.connect import open_store
from worker.contract import BaseToPissa, Job, JobRequest
from worker.embedded import embedded_valkey
from worker.terms import Phase, Status

DRIP = {"drip": 4096, "drip_s": 0.2, "times": 10_000}
"""A megabyte would take most of a minute, without ever being so slow that it is given up."""
AMID = 20_000
"""More bytes than any header here has."""
FROM_HUB = {
    "base-to-pissa": {"model": "org/m"},
    "pissa-to-lora": {"trained": "org/adapter", "initial": "./pair/pissa_init"},
    "pissa-to-base": {"residual": "org/pair", "adapter": "./pair/pissa_init"},
    "verify": {"original": "org/m", "converted": "./pair"},
}
FROM_FOLDER = {
    "base-to-pissa": {"model": "./m"},
    "pissa-to-lora": {"trained": "./pair/pissa_init", "initial": "./pair/pissa_init"},
    "pissa-to-base": {"residual": "./pair", "adapter": "./pair/pissa_init"},
}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running(Hub()) as served:
        yield served


@pytest.fixture(scope="module")
def beside(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose worker reads from and writes to the test Hub."""
    folder = tmp_path_factory.mktemp("cancel")
    root = folder / "models"
    hub.create_repo("org/m", write_llama(root / "m", layers=1, hidden=320, shards=1))
    convert_to(root / "m", root / "pair", {"rank": 32})
    hub.create_repo("org/pair", root / "pair")
    hub.create_repo("org/adapter", root / "pair" / "pissa_init")
    with embedded_valkey(folder / "data") as url:
        settings = quick_settings(url, folder / "data", root)
        store = open_store(settings)
        log = folder / "worker.log"
        with running_worker(settings, log, hub=hub.endpoint):
            wait_for(lambda: log.read_text().count("ready.") == 2, "both nodes")
            yield Service(store, settings, root, log)
        store.close()


def cancel_amid(
    service: Service, hub: Hub, body: Mapping[str, object], method: str, *, discard: bool
) -> Job:
    """Cancel a job amid a transfer that drips."""
    fault = hub.faults.add(Fault("/blobs/" if method == "GET" else "", method=method, **DRIP))
    begun = len(hub.seen)

    def amid() -> bool:
        return any(seen.sent + seen.received > AMID for seen in list(hub.seen)[begun:])

    request = TypeAdapter(JobRequest).validate_python(body)
    token = hub.create_token("me")
    job_id = service.store.submit(request, owner="me", hub_token=token)[0].id
    wait_for(amid, "the transfer")
    cancelled = service.store.cancel(job_id, discard=discard).status
    assert cancelled in (Status.CANCELLING, Status.CANCELLED)
    job = wait_for_end(service.store, job_id)
    fault.times = 0
    return job


def left(service: Service) -> list[Path]:
    scratch = service.settings.scratch_dir
    folders = [service.root, service.settings.files_dir, scratch]
    found = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    return [path for path in found if path.name not in ("m", "pair", ".pissa-storage-id")]


@pytest.mark.parametrize("kind", FROM_HUB)
def test_a_download_is_cut_short(beside: Service, hub: Hub, kind: str) -> None:
    body = {"kind": kind, **FROM_HUB[kind]}
    if kind != "verify":
        body["output"] = "./out"
    job = cancel_amid(beside, hub, body, "GET", discard=False)
    assert job.status is Status.CANCELLED
    shards = job.progress.shards
    assert shards.done < max(1, shards.total)
    assert left(beside) == []


@pytest.mark.parametrize("discard", [True, False])
@pytest.mark.parametrize("kind", FROM_FOLDER)
def test_an_upload_is_cut_short(beside: Service, hub: Hub, kind: str, discard: bool) -> None:
    hub.repos.pop("me/out", None)
    body = {"kind": kind, **FROM_FOLDER[kind], "output": "hf://me/out"}
    job = cancel_amid(beside, hub, body, "PUT", discard=discard)
    assert job.status is Status.CANCELLED
    assert left(beside) == []
    assert job.progress.shards.done == 0
    assert list(hub.repos["me/out"].branches) == ["main"]


def test_a_wait_that_the_hub_asks_for_is_left_at_once(beside: Service, hub: Hub) -> None:
    wait = Fault("/commit/pissa-staging-", "POST", status=429, headers={"Retry-After": "3000"})
    hub.faults.add(wait)
    body = BaseToPissa(model="./m", output={"ref": "hf://me/waits"})
    before = beside.logged()
    job_id = beside.store.submit(body, owner="me", hub_token=hub.create_token("me"))[0].id
    wait_for(lambda: beside.store.get(job_id).phase is Phase.WAITING, "the phase waiting")
    beside.store.cancel(job_id, discard=True)
    assert wait_for_end(beside.store, job_id).status is Status.CANCELLED
    logged = beside.logged()[len(before) :]
    assert "the task is left: cancelled" in logged
    assert "this process does" not in logged
    assert left(beside) == []
