"""What the tests of the worker share: a store each, and one service for tests that only use it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from service_fixtures import *  # noqa: F403
from worker_tools import running_worker, wait_for

from worker.connect import open_store
from worker.embedded import embedded_valkey
from worker.settings import Settings
from worker.store import JobStore


@dataclass(frozen=True)
class Service:
    """A store with a worker, and the folder that both share."""

    store: JobStore
    settings: Settings
    root: Path
    log: Path

    def logged(self) -> str:
        return self.log.read_text()


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One running service for all tests that leave it as they found it."""
    folder = tmp_path_factory.mktemp("service")
    root = folder / "models"
    root.mkdir()
    with embedded_valkey(folder / "data") as url:
        settings = quick_settings(url, folder / "data", root)  # noqa: F405
        store = open_store(settings)
        log = folder / "worker.log"
        with running_worker(settings, log):
            wait_for(lambda: log.read_text().count("ready.") == 2, "both nodes")
            yield Service(store, settings, root, log)
        store.close()
