"""Clients that are slow or never come to the point cost a connection for a while, no more."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest
from api_tools import BODY, served

import app.intake
from app.server import ImpatientProtocol
from worker.contract import BaseToPissa


class QuickProtocol(ImpatientProtocol):
    head_s = 0.3
    unread_s = 0.5


@contextmanager
def connected(home: str, *, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    address = urlsplit(home)
    with socket.socket() as connection:
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(20)
        connection.connect((address.hostname, address.port))
        yield connection


def everything(connection: socket.socket) -> bytes:
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return received


@pytest.fixture
def home(make_app) -> Iterator[str]:
    with served(make_app(), http=QuickProtocol) as url:
        yield url


@pytest.mark.parametrize("head", [b"", b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n"])
def test_a_request_that_does_not_come_is_not_waited_for(home, head):
    with connected(home) as connection:
        connection.sendall(head)
        assert everything(connection) == b""


def test_a_request_byte_by_byte_is_not_waited_for(home):
    with connected(home) as connection:
        connection.settimeout(0.02)
        for _ in range(500):
            try:
                connection.sendall(b"X")
                assert connection.recv(1) == b""
                break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            pytest.fail("it is still waited for")


def test_a_slow_answer_is_waited_for(home):
    with connected(home) as connection:
        post = json.dumps(BODY).encode()
        head = b"POST /v1/plans HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(post) + post)
        # Nobody makes the plan: the answer takes a second, which is longer than a head may.
        assert everything(connection).startswith(b"HTTP/1.1 504")


def test_a_connection_is_kept_for_the_next_request_and_then_let_go(home):
    address = urlsplit(home)
    connection = HTTPConnection(address.hostname, address.port, timeout=20)
    with closing(connection):
        connection.connect()
        kept = connection.sock
        for _ in range(4):
            connection.request("GET", "/livez")
            assert connection.getresponse().read() == b'{"status":"ok"}'
            assert connection.sock is kept
            time.sleep(0.1)
        assert everything(kept) == b""


def test_a_body_that_does_not_come_is_not_waited_for(home, monkeypatch):
    monkeypatch.setattr(app.intake, "BODY_S", 0.2)
    with connected(home) as connection:
        head = b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{"
        connection.sendall(head)
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"code":"request_timeout"' in answer


def wait_until(true, patience_s: float = 20.0) -> None:
    deadline = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


@contextmanager
def streaming(make_app, store, count: int) -> Iterator[tuple[socket.socket, object]]:
    """A client that has asked for `count` large events; and the streams that are counted."""
    app = make_app(max_streams=1)
    job_id = store.submit(BaseToPissa.model_validate(BODY), owner="local")[0].id
    data = {"type": "matrix_done", "data": json.dumps({"module": "x" * 100_000})}
    for _ in range(count):
        store.connection.client.xadd(f"pissa:job:{job_id}:events", data)
    with served(app, http=QuickProtocol) as home:
        held = app.state.limits._streams["local"]
        with connected(home, receive_buffer=4096) as connection:
            head = f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
            connection.sendall(head.encode())
            wait_until(lambda: len(held) == 1)
            yield connection, held


def test_events_that_nobody_reads_are_not_kept_for_ever(make_app, store):
    with streaming(make_app, store, 100) as (_, held):
        wait_until(lambda: not held)


def test_a_reader_who_leaves_is_counted_no_more(make_app, store):
    with streaming(make_app, store, 1) as (connection, held):
        connection.close()
        wait_until(lambda: not held)


def test_many_silent_clients_do_not_keep_others_waiting(home):
    silent = [socket.create_connection((urlsplit(home).hostname, urlsplit(home).port))
              for _ in range(200)]  # fmt: skip
    try:
        with connected(home) as connection:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    finally:
        for connection in silent:
            connection.close()
