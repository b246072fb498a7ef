"""The server of `pissa serve`: uvicorn, with an end to its patience.

uvicorn waits for the head of a request, and for a client to read what it was sent, as long as it
takes. A client that sends a byte a minute, or reads none, would hold its connection for ever, and
a thousand of them all there are.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from worker.logs import configure_logging

HEAD_S = 10.0
"""How long the head of a request may take, from the first look at the connection on."""

UNREAD_S = 60.0
"""How long a client may leave what was sent unread."""

STOP_S = 3
"""How long an open connection (a stream of events) may hold up the end."""


class ImpatientProtocol(H11Protocol):
    """HTTP/1.1 that closes a connection whose next request does not come in time."""

    head_s = HEAD_S
    unread_s = UNREAD_S
    _deadline: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)  # type: ignore[arg-type]  # uvicorn narrows it
        self._wait_or_not()

    def data_received(self, data: bytes) -> None:
        """Take what came; go on waiting while it is no whole head."""
        super().data_received(data)
        self._wait_or_not()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        super().on_response_complete()
        self._wait_or_not()

    def pause_writing(self) -> None:
        """Begin to wait for the client to read; what it left unread goes with the connection."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.unread_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on writing to a client that reads."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        super().connection_lost(exc)
        self._forget()
        if self._unread is not None:
            self._unread.cancel()

    def _wait_or_not(self) -> None:
        at_work = self.cycle is not None and not self.cycle.response_complete
        if at_work:
            self._forget()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.head_s, self.transport.close)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def serve_until_signalled(app: FastAPI, door: socket.socket) -> None:
    """Serve `app` on an open socket until SIGINT or SIGTERM, which uvicorn raises again."""
    # On a terminal somebody looks at the page; what is asked of it there is no news.
    configure_logging("api", logging.WARNING if sys.stderr.isatty() else logging.INFO)
    config = uvicorn.Config(
        app,
        http=ImpatientProtocol,
        log_config=None,
        log_level="warning",
        timeout_graceful_shutdown=STOP_S,
        server_header=False,
    )
    uvicorn.Server(config).run(sockets=[door])
