"""The API wired from the environment: ``uvicorn app.asgi:app``, or `make_app` for `pissa serve`."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, closing

from click import ClickException
from fastapi import FastAPI

from app.door import in_command_of_uvicorn, refuse_open_server
from app.factory import create_app
from pissa_core.errors import PissaError
from worker.connect import open_store
from worker.embedded import embedded_valkey
from worker.logs import configure_logging
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


def _app_for_a_server() -> FastAPI:
    try:
        settings = Settings.from_env()
        refuse_open_server(settings)
    except PissaError as error:
        if not in_command_of_uvicorn():
            raise
        hint = f"\nhint: {error.hint}" if error.hint else ""
        raise ClickException(f"[{error.code}] {error.message}{hint}") from error
    return make_app(settings)


def __getattr__(name: str) -> FastAPI:
    """Make `app` when a server asks for it: importing this module reads and opens nothing."""
    if name == "app":
        if logging.getLogger("uvicorn").handlers:
            # uvicorn logs to its own taste unless told otherwise; within another server, or a
            # test, logging is not ours to set up.
            configure_logging("api")
        return _app_for_a_server()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
