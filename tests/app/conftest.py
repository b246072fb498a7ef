"""What the tests of the API share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from played import PlayedWorker
from service_fixtures import *  # noqa: F403

from app.factory import create_app
from worker.settings import Settings
from worker.store import JobStore

MakeApp = Callable[..., FastAPI]


@pytest.fixture
def make_app(settings: Settings, store: JobStore) -> MakeApp:
    """Return a function that makes the API over this test's store; arguments change settings."""

    def make(*, plan_timeout_s: float = 1.0, **changes: Any) -> FastAPI:
        return create_app(settings.model_copy(update=changes), store, plan_timeout_s=plan_timeout_s)

    return make


@pytest.fixture
def worker(settings: Settings) -> Iterator[PlayedWorker]:
    """A worker whose every step the test decides."""
    played = PlayedWorker(settings)
    yield played
    played.close()
