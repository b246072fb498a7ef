"""Anything may die, or sleep, at any moment: every job ends, with the bytes it always has."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import redis
from conftest import Service
from service_fixtures import quick_settings
from worker_tools import (
    checksums,
    kill_tree,
    leftovers,
    request,
    running_worker,
    wait_for,
    wait_for_end,
    wait_for_matrices,
    write_llama,
)

from worker.connect import open_store
from worker.contract import Job
from worker.embedded import embedded_valkey
from worker.store import JobStore
from worker.terms import Status, Task

SLOW = {"method": "exact"}
MATRICES = 28


@pytest.fixture
def model(service: Service, tmp_path: Path) -> Path:
    """One shard of 28 matrices that take their time."""
    return write_llama(service.root / tmp_path.name / "m", layers=4, hidden=320, shards=1)


@pytest.fixture
def undisturbed(service: Service, model: Path) -> dict[str, str]:
    """Checksums of what a worker makes of it that nobody disturbs."""
    body = request(model, model.parent / "undisturbed", svd=SLOW)
    job = wait_for_end(service.store, service.store.submit(body, owner="me")[0].id)
    assert job.status is Status.SUCCEEDED
    return checksums(model.parent / "undisturbed")


def start(store: JobStore, model: Path) -> str:
    body = request(model, model.parent / "out", svd=SLOW)
    job_id = store.submit(body, owner="me")[0].id
    wait_for_matrices(store, job_id, 3)
    return job_id


def check(job: Job, model: Path, undisturbed: dict[str, str]) -> None:
    assert job.status is Status.SUCCEEDED, job.error
    assert job.progress.matrices.done == MATRICES
    assert checksums(model.parent / "out") == undisturbed
    assert leftovers(model.parent) == []


def resumed_matrices(store: JobStore, job_id: str) -> list[int]:
    events = [event for event in store.events(job_id)[0] if event.type.value == "shard_started"]
    return [event.data["resumed"] for event in events]


def kill_store(url: str) -> None:
    client = redis.Redis.from_url(url)
    server = psutil.Process(int(client.info("server")["process_id"]))
    client.close()
    server.kill()
    wait_for(lambda: not server.is_running(), "the end of the store", 10)


def worker_pid(service: Service) -> int:
    return int(service.store.workers()[0].name.partition("@")[0].rpartition("-")[2])


def holder_of(store: JobStore, job_id: str) -> int:
    """Return the process that holds a task of the job."""
    leases = store.connection.call("leases")["leases"] or []
    [holder] = [lease["holder"] for lease in leases if lease["id"] == job_id]
    return int(holder.split("/")[1])


@pytest.mark.slow
def test_worker_and_store_killed_within_a_shard(
    model: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    with ExitStack() as stack:
        url = stack.enter_context(embedded_valkey(data))
        settings = quick_settings(url, data, model.parents[1])
        store = open_store(settings, patience_s=20)
        stack.callback(store.close)
        with running_worker(settings, tmp_path / "first.log") as first:
            job_id = start(store, model)
            kill_tree(first.pid)
        done = store.get(job_id).progress.matrices.done
        kill_store(url)
        with running_worker(settings, tmp_path / "second.log"):
            wait_for_matrices(store, job_id, done + 2)
            kill_store(url)
            job = wait_for_end(store, job_id)
        check(job, model, undisturbed)
        # What the first worker had told, and perhaps one that it had just written, is not redone.
        assert resumed_matrices(store, job_id)[1] >= done >= 3
        assert store.workers() == []


def test_a_killed_child_is_noticed_by_its_node(
    service: Service, model: Path, undisturbed: dict[str, str]
) -> None:
    job_id = start(service.store, model)
    os.kill(holder_of(service.store, job_id), signal.SIGKILL)
    job = wait_for_end(service.store, job_id)
    check(job, model, undisturbed)
    assert job.attempts == 2
    [lost] = [e for e in service.store.events(job_id)[0] if e.type.value == "waiting"]
    assert lost.data["code"] == "worker_lost"
    assert resumed_matrices(service.store, job_id)[1] >= 3


@pytest.mark.slow
def test_a_shard_goes_from_a_sleeping_worker_to_a_stopping_one_and_back(
    service: Service, model: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    job_id = start(service.store, model)
    sleeper = worker_pid(service)
    stale = holder_of(service.store, job_id)
    kill_tree(sleeper, signal.SIGSTOP)
    try:
        with running_worker(service.settings, tmp_path / "second.log"):
            # The sleeper's scratch is locked while it lives: the second begins from nothing.
            wait_for(
                lambda: len(resumed_matrices(service.store, job_id)) == 2, "the second attempt"
            )
            assert holder_of(service.store, job_id) != stale
    finally:
        kill_tree(sleeper, signal.SIGCONT)
    job = wait_for_end(service.store, job_id)
    check(job, model, undisturbed)
    assert "the lease is lost" in service.logged()


def test_messages_that_come_twice_do_nothing(
    service: Service, model: Path, undisturbed: dict[str, str]
) -> None:
    job_id = start(service.store, model)
    sender, queue = service.store.connection.sender, _work_queue(service, job_id)
    for _ in range(5):
        sender.enqueue(Task.SHARD, job_id, 0, queue=queue, task_id=f"{job_id}|shard:0")
        sender.enqueue(Task.PUBLISH, job_id, queue=queue, task_id=f"{job_id}|publish")
    job = wait_for_end(service.store, job_id)
    check(job, model, undisturbed)
    kinds = [event.type.value for event in service.store.events(job_id)[0]]
    assert [kinds.count(kind) for kind in ("matrix_done", "shard_done", "succeeded")] == [
        MATRICES, 1, 1,
    ]  # fmt: skip


def test_cancelling_does_not_wait_for_a_huge_matrix(service: Service, tmp_path: Path) -> None:
    model = write_llama(service.root / tmp_path.name / "m", layers=1, hidden=2400, shards=1)
    body = request(model, model.parent / "out", svd=SLOW)
    job_id = service.store.submit(body, owner="me")[0].id

    def in_hand() -> bool:
        kinds = [event.type.value for event in service.store.events(job_id)[0]]
        return "shard_started" in kinds

    wait_for(in_hand, "the first matrix")
    service.store.cancel(job_id, discard=True)
    job = wait_for_end(service.store, job_id)
    assert job.status is Status.CANCELLED
    assert job.progress.matrices.done == 0
    assert [path.name for path in model.parent.iterdir()] == ["m"]


@pytest.mark.slow
def test_a_killed_worker_takes_its_nodes_along(service: Service, tmp_path: Path) -> None:
    log = tmp_path / "second.log"
    with running_worker(service.settings, log) as worker:
        wait_for(lambda: "ready." in log.read_text(), "a node")
        nodes = psutil.Process(worker.pid).children(recursive=True)
        assert nodes
        worker.kill()
        worker.wait()
        psutil.wait_procs(nodes, timeout=20)
        assert [node for node in nodes if node.is_running()] == []


def _work_queue(service: Service, job_id: str) -> str:
    return str(service.store.connection.client.hget(f"pissa:job:{job_id}", "work_queue"))
