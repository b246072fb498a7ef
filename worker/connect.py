"""Put the store together from settings: connection, sender, vault, storages. Torch-free."""

from __future__ import annotations

from pissa_core.errors import InvalidRequest
from worker.places import storages
from worker.queue import Queue
from worker.settings import Settings
from worker.store import JobStore
from worker.store.connection import Connection
from worker.vault import open_vault

API_PATIENCE_S = 3.0


def connect(settings: Settings, *, patience_s: float = API_PATIENCE_S) -> Connection:
    """Return a connection to the store at `settings.redis_url`.

    Raises:
        InvalidRequest: if there is no such URL.
    """
    if settings.redis_url is None:
        raise InvalidRequest(
            "PISSA_REDIS_URL is not set, and nothing has started an embedded store",
            hint="run `pissa serve`, or point PISSA_REDIS_URL at a Valkey or Redis server",
        )
    return Connection(settings.redis_url, Queue(settings.redis_url), patience_s=patience_s)


def open_store(settings: Settings, *, patience_s: float = API_PATIENCE_S) -> JobStore:
    """Return the job store as the API uses it; close it when done."""
    return JobStore(
        connect(settings, patience_s=patience_s),
        vault=open_vault(settings),
        shared=storages(settings),
        settings=settings,
    )
