"""Scratch on a machine whose job ended elsewhere: it goes, and nothing else does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub.server import running
from hub.state import Hub
from pydantic import SecretStr
from service_fixtures import quick_settings
from worker_tools import (
    kill_tree,
    running_worker,
    wait_for,
    wait_for_end,
    wait_for_matrices,
    write_llama,
)

from pissa_core.adapters.ledger import Ledger
from pissa_core.adapters.local.scratch import open_scratch, remove_scratch
from worker.connect import open_store
from worker.contract import BaseToPissa
from worker.embedded import embedded_valkey
from worker.settings import Settings
from worker.store import JobStore
from worker.sweeping import Sweeper
from worker.terms import Status

pytestmark = pytest.mark.slow

SLOW = {"rank": 4, "svd": {"method": "exact"}}


@dataclass(frozen=True)
class Service:
    """A store, a Hub, and the settings of two machines that share no disk."""

    store: JobStore
    first: Settings
    second: Settings
    hub: Hub
    token: str
    folder: Path

    @contextmanager
    def worker(self, settings: Settings) -> Iterator[int]:
        """Run a worker on one of the machines; give its process id."""
        log = settings.data_dir.with_suffix(".log")
        known = log.read_text().count("ready.") if log.exists() else 0
        with running_worker(settings, log, hub=self.hub.endpoint) as process:
            wait_for(lambda: log.read_text().count("ready.") == known + 2, "both nodes")
            yield process.pid

    def submit(self, model: str, name: str) -> str:
        body = BaseToPissa(model=model, output={"ref": f"hf://me/{name}"}, pissa=SLOW)
        return self.store.submit(body, owner="me", hub_token=self.token)[0].id

    def digest(self, job_id: str) -> str:
        return str(self.store.connection.client.hget(f"pissa:job:{job_id}", "digest"))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("sweeping")
    with running(Hub()) as hub, embedded_valkey(folder / "store") as url:
        for name, shards in (("one", 1), ("two", 2)):
            model = write_llama(folder / name, layers=4, hidden=320, shards=shards)
            hub.create_repo(f"org/{name}", model)
        first, second = (
            quick_settings(url, folder / name, folder).model_copy(
                update={"secret_key": SecretStr("one key for all"), "local_root": None}
            )
            for name in ("first", "second")
        )
        store = open_store(first)
        yield Service(store, first, second, hub, hub.create_token("me"), folder)
        store.close()


def scratch(settings: Settings) -> list[str]:
    """Return what lies in the folder of scratch, reservations and locks included."""
    found = settings.scratch_dir.rglob("*")
    return [str(path.relative_to(settings.scratch_dir)) for path in sorted(found)]


def test_a_machine_that_comes_back_sweeps_what_others_ended_and_nothing_else(
    service: Service,
) -> None:
    settings = service.first
    with service.worker(settings) as pid:
        job_id = service.submit("org/one", "killed")
        wait_for_matrices(service.store, job_id, 3)
        kill_tree(pid)
    digest = service.digest(job_id)
    assert any(name.endswith("journal") for name in scratch(settings))
    with service.worker(service.second):
        assert wait_for_end(service.store, job_id).status is Status.SUCCEEDED
    # A command that was interrupted goes on from its scratch; one that runs holds a lock.
    interrupted = settings.scratch_dir / "of-a-command" / "shard" / "token" / "journal"
    interrupted.parent.mkdir(parents=True)
    interrupted.touch()
    alive, lock = open_scratch(settings.scratch_dir / digest / "held")
    result = settings.scratch_dir / digest
    reservation = Ledger(settings.scratch_dir).try_hold(1000, alive, waited_s=0)
    with reservation, service.worker(settings):
        wait_for(lambda: not list(result.glob("model-*")), "the sweep")
        assert (alive / "lock").exists()
        assert reservation.path.exists()
        remove_scratch(alive)
        os.close(lock)
        wait_for(lambda: not result.exists(), "the second sweep")
    assert {name.partition("/")[0] for name in scratch(settings)} == {"of-a-command"}
    assert interrupted.exists()
    shutil.rmtree(settings.scratch_dir / "of-a-command")


HOLD = """
import sys, time
from pathlib import Path
from pissa_core.adapters.ledger import Ledger

folder = Path(sys.argv[1])
reservation = Ledger(folder).try_hold(1000, folder / "gone", waited_s=0)
print("held", flush=True)
time.sleep(600)
"""


def test_what_a_killed_process_reserved_is_forgotten_once_its_scratch_is_gone(
    service: Service,
) -> None:
    folder = service.first.scratch_dir
    sweeper = Sweeper(service.store.connection, service.first)
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        sweeper.round()
        assert len(scratch(service.first)) == 2  # the reservation, and the lock beside it
        process.kill()
    sweeper.round()
    assert scratch(service.first) == []


def test_a_worker_that_slept_through_the_end_of_its_job_leaves_nothing(service: Service) -> None:
    with service.worker(service.second) as sleeper:
        job_id = service.submit("org/one", "slept")
        wait_for_matrices(service.store, job_id, 3)
        kill_tree(sleeper, signal.SIGSTOP)
        try:
            with service.worker(service.first):
                assert wait_for_end(service.store, job_id).status is Status.SUCCEEDED
            held = scratch(service.second)
        finally:
            kill_tree(sleeper, signal.SIGCONT)
        assert any(name.endswith("journal") for name in held)
        wait_for(lambda: not scratch(service.second), "the sleeper's scratch to go")


def test_cancelling_clears_the_disks_of_all_machines(service: Service) -> None:
    with service.worker(service.first), service.worker(service.second):
        job_id = service.submit("org/two", "cancelled")
        machines = service.first, service.second

        def both_work() -> bool:
            return all(any(name.endswith("journal") for name in scratch(m)) for m in machines)

        wait_for(both_work, "a shard on each machine")
        service.store.cancel(job_id, discard=False)
        assert wait_for_end(service.store, job_id).status is Status.CANCELLED
        for settings in machines:
            wait_for(lambda s=settings: not scratch(s), "an empty disk")
