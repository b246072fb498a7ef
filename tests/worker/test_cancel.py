"""Cancelling cuts a job short in the middle of a transfer, and nothing lies about."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Service
from hub.faults import Fault
from hub.server import running
from hub.state import Hub
from service_fixtures import quick_settings
from worker_tools import running_worker, wait_for, wait_for_end, write_llama

from worker.connect import open_store
from worker.contract import BaseToPissa, Job, Status
from worker.embedded import embedded_valkey

DRIP = {"drip": 4096, "drip_s": 0.2}
"""A megabyte would take most of a minute, without ever being so slow that it is given up."""


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
    with embedded_valkey(folder / "data") as url:
        settings = quick_settings(url, folder / "data", root)
        store = open_store(settings)
        log = folder / "worker.log"
        with running_worker(settings, log, hub=hub.endpoint):
            wait_for(lambda: log.read_text().count("ready.") == 2, "both nodes")
            yield Service(store, settings, root, log)
        store.close()


def cancel_amid(service: Service, hub: Hub, body: BaseToPissa, fault: Fault, token: str) -> Job:
    """Cancel a job once the transfer that drips has begun."""
    hub.faults.add(fault)
    begun = len(hub.seen)

    def dripping() -> bool:
        now = [seen for seen in list(hub.seen)[begun:] if seen.method == fault.method]
        return fault.times == 0 and any(seen.sent or seen.received for seen in now)

    job_id = service.store.submit(body, owner="me", hub_token=token)[0].id
    wait_for(dripping, "the transfer")
    assert service.store.cancel(job_id, discard=True).status in (
        Status.CANCELLING,
        Status.CANCELLED,
    )
    return wait_for_end(service.store, job_id)


def left(service: Service) -> list[Path]:
    scratch = service.settings.scratch_dir
    folders = [service.root, service.settings.files_dir, scratch]
    found = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    return [path for path in found if path.name not in ("m", ".pissa-storage-id")]


def test_a_download_is_cut_short(beside: Service, hub: Hub) -> None:
    body = BaseToPissa(model="org/m", output={"ref": "./out"})
    job = cancel_amid(beside, hub, body, Fault(r"/blobs/", **DRIP), hub.create_token("me"))
    assert job.status is Status.CANCELLED
    assert job.progress.matrices.done == 0
    assert left(beside) == []


def test_an_upload_is_cut_short(beside: Service, hub: Hub) -> None:
    body = BaseToPissa(model="./m", output={"ref": "hf://me/out"})
    fault = Fault(r"", method="PUT", **DRIP)
    job = cancel_amid(beside, hub, body, fault, hub.create_token("me"))
    assert job.status is Status.CANCELLED
    assert left(beside) == []
    assert list(hub.repos["me/out"].branches) == ["main"]
