"""Fixtures of a service in a folder of its own: embedded Valkey, settings, the job store.

Import them into a conftest: ``from service_fixtures import *``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.connect import open_store
from worker.embedded import embedded_valkey
from worker.settings import Settings
from worker.store import JobStore, TaskStore

__all__ = ["local_root", "quick_settings", "settings", "store", "store_url", "tasks"]


def quick_settings(store_url: str, data_dir: Path, local_root: Path) -> Settings:
    """Settings as an operator would give them, with waits cut short."""
    return Settings(
        redis_url=store_url,
        data_dir=data_dir,
        local_root=local_root,
        lease_s=2,
        renew_s=0.5,
        watch_s=0.1,
        reap_s=0.2,
        retry_s=0.2,
        max_retries=1,
        stop_s=4,
        cancel_s=1,
        no_worker_s=2,
    )


@pytest.fixture
def local_root(tmp_path: Path) -> Path:
    """The folder that jobs may read and write in."""
    root = tmp_path / "models"
    root.mkdir()
    return root


@pytest.fixture
def store_url(tmp_path: Path) -> Iterator[str]:
    """A real Valkey of this test's own, ended with it."""
    with embedded_valkey(tmp_path / "data") as url:
        yield url


@pytest.fixture
def settings(store_url: str, tmp_path: Path, local_root: Path) -> Settings:
    """Settings of a service in this test's own folder."""
    return quick_settings(store_url, tmp_path / "data", local_root)


@pytest.fixture
def store(settings: Settings) -> Iterator[JobStore]:
    """The job store as the API uses it."""
    opened = open_store(settings)
    yield opened
    opened.close()


@pytest.fixture
def tasks(store: JobStore, settings: Settings) -> TaskStore:
    """The job store as a worker uses it."""
    return TaskStore(store.connection, settings, worker="hand@here")
