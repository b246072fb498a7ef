"""What the API's tests share: an API in this process, or one behind a real socket."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

HOME = "http://127.0.0.1"
BODY: dict[str, Any] = {"kind": "base-to-pissa", "model": "org/name", "pissa": {"rank": 8}}


def client_of(app: FastAPI, key: str | None = None) -> TestClient:
    """Return a client that calls `app` in this process, under a loopback name."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return TestClient(app, base_url=HOME, headers=headers)


@contextmanager
def served(app: FastAPI, **options: Any) -> Iterator[str]:
    """Serve `app` on a free loopback port, in a thread; stopped at the end."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server ended before it was up"
            thread.join(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"{HOME}:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"
