"""The API wired from the environment: ``uvicorn app.asgi:app``, or `make_app` for `pissa serve`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, closing

from fastapi import FastAPI

from app.factory import create_app
from worker.connect import open_store
from worker.embedded import embedded_valkey
from worker.settings import Settings
from worker.store import Reaper
from worker.store.retention import Retention


def make_app(settings: Settings) -> FastAPI:
    """Return the API; the store is opened when the server starts, and closed when it stops.

    Where no store is named, an embedded Valkey in the data folder is started for it.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with ExitStack() as stack:
            url = settings.redis_url or stack.enter_context(embedded_valkey(settings.data_dir))
            connected = settings.model_copy(update={"redis_url": url})
            store = stack.enter_context(closing(open_store(connected)))
            stack.enter_context(Reaper(store.connection, connected))
            stack.enter_context(Retention(store, connected))
            app.state.store = store
            yield

    return create_app(settings, lifespan=lifespan)


def __getattr__(name: str) -> FastAPI:
    """Make `app` when a server asks for it: importing this module reads and opens nothing."""
    if name == "app":
        return make_app(Settings.from_env())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
