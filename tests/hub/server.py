"""A Hub for tests: real HTTP on loopback, spoken to by the real client.

Two ports, as with the real one: the Hub itself, and the storage it redirects to for large files,
which knows no tokens and refuses a request that carries one. Repos live in memory or in folders.
"""

from __future__ import annotations

import http.server
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub.blobs import Blob, Bytes, Gone
from hub.body import Body, Cut
from hub.calls import Answer, Call, Refusal, refused
from hub.faults import Fault
from hub.lfs import LFS, put_part
from hub.reading import READING
from hub.repos import Token
from hub.state import Hub, Seen
from hub.writing import WRITING

ROUTES = (*READING, *WRITING, *LFS)
_PIECE = 1 << 20


def _pattern(route: str) -> re.Pattern[str]:
    return re.compile(route.replace("{id}", r"[^/]+(?:/[^/]+)?").replace("{s}", "[^/]+") + "$")


_COMPILED = tuple((method, _pattern(route), work) for method, route, work in ROUTES)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: Hub, handler: type[http.server.BaseHTTPRequestHandler], port: int):
        super().__init__(("127.0.0.1", port), handler)
        self.hub = hub
        self.open: set[socket.socket] = set()

    def process_request(self, request: Any, address: Any) -> None:
        self.open.add(request)
        super().process_request(request, address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, address: Any) -> None:
        """A client that hangs up is no error of the Hub's."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, address)

    def end(self) -> None:
        """Stop, and hang up on everybody who keeps a connection open."""
        self.shutdown()
        for connection in list(self.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the client's delayed ACK
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_one(self) -> None:
        split = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(split.query).items()}
        # Some headers of a request differ in case only; a plain dict is enough for tests.
        headers = {k.lower(): v for k, v in self.headers.items()}
        seen = Seen(self.command, split.path, query, headers)
        hub = self.server.hub
        hub.seen.append(seen)
        fault = hub.faults.take(self.command, split.path)
        body = Body(self.rfile, headers, seen, fault if self.command == "PUT" else None)
        try:
            if fault is not None and fault.run is not None:
                body.hold()
                fault.run(headers.get("authorization", "").removeprefix("Bearer "))
            if fault is not None and fault.stall_s:
                hub.ended.wait(fault.stall_s)
            if fault is not None and fault.drop and not fault.served:
                self.close_connection = True
                return
            answer = self.work(split.path, query, body, seen, fault)
            body.drain()
        except Cut:
            self.close_connection = True
            return
        if fault is not None and fault.drop:
            self.close_connection = True
            return
        self.send(answer, seen, None if self.command == "PUT" else fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_one

    def work(
        self, path: str, query: dict[str, str], body: Body, seen: Seen, fault: Fault | None
    ) -> Answer:
        """Answer as the route does, or as the fault would have it."""
        instead = _faulty(fault)
        if instead is not None and not (fault and fault.served):
            return instead
        method = "GET" if self.command == "HEAD" else self.command
        try:
            answer = self.answer(method, path, query, body, seen)
        except Refusal as refusal:
            return refused(refusal)
        return instead or answer

    def answer(
        self, method: str, path: str, query: dict[str, str], body: Body, seen: Seen
    ) -> Answer:
        call = Call(self.server.hub, self.token(), query, body, seen)
        for wanted, pattern, work in _COMPILED:
            if wanted == method and (match := pattern.match(path)):
                named = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                return work(call, **named)
        raise Refusal(404, f"no route for {method} {path}")

    def token(self) -> Token | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        token = self.server.hub.tokens.get(header.removeprefix("Bearer "))
        if token is None or not token.valid:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return token

    def send(self, answer: Answer, seen: Seen, fault: Fault | None) -> None:
        start, stop = 0, answer.body.size
        asked = self.headers.get("Range")
        if answer.ranged and asked and not (fault and fault.ignore_range):
            start, stop = _range(asked, answer.body.size)
            answer.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{answer.body.size}"
            answer.status = 206
        seen.status = answer.status
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        for chunk in _chunks(answer.body, start, stop, fault):
            seen.sent += len(chunk)  # counted first: once a client has it, it is counted
            self.wfile.write(chunk)
        if seen.sent < stop - start:
            self.close_connection = True


class _Storage(_Handler):
    """Where large files are: no tokens, one route to read and one to write."""

    def answer(
        self, method: str, path: str, query: dict[str, str], body: Body, seen: Seen
    ) -> Answer:
        if "Authorization" in self.headers:
            raise Refusal(400, "only one way of authentication is allowed")
        if method == "PUT":
            call = Call(self.server.hub, None, query, body, seen)
            name, _, part = path.removeprefix("/uploads/").partition("/")
            return put_part(call, name, part)
        blob = self.server.hub.blobs.get(path.removeprefix("/blobs/"))
        if blob is None:
            raise Refusal(404, "no such blob")
        if isinstance(blob, Gone):
            raise Refusal(410, "this blob was swallowed")
        seen.subject = query.get("file", "")
        return Answer(200, {"ETag": f'"{blob.sha256}"'}, blob, ranged=True)


def _chunks(body: Blob, start: int, stop: int, fault: Fault | None) -> Iterator[bytes]:
    """Yield the body as the fault would have it."""
    if fault and fault.cut_after is not None:
        stop = min(stop, start + fault.cut_after)
    step = (fault and fault.drip) or _PIECE
    while start < stop:
        chunk = body.read(start, min(start + step, stop))
        if fault and fault.corrupt_at is not None and 0 <= fault.corrupt_at - start < len(chunk):
            at = fault.corrupt_at - start
            chunk = chunk[:at] + bytes([chunk[at] ^ 0xFF]) + chunk[at + 1 :]
        yield chunk
        start += len(chunk)
        if fault and fault.drip:
            time.sleep(fault.drip_s)


def _range(header: str, size: int) -> tuple[int, int]:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", header)
    if match is None or int(match[1]) >= size:
        raise Refusal(416, "the range cannot be satisfied")
    return int(match[1]), min(int(match[2] or size - 1) + 1, size)


def _faulty(fault: Fault | None) -> Answer | None:
    if fault is None:
        return None
    if fault.body is not None:
        return Answer(200, {"Content-Type": "text/html"}, Bytes(fault.body))
    if fault.status is None:
        return None
    answer = refused(Refusal(fault.status, "a fault on demand", fault.code))
    answer.headers |= fault.headers
    return answer


@contextmanager
def running(hub: Hub, *, port: int = 0) -> Iterator[Hub]:
    """Serve `hub` on loopback until the block is left."""
    servers = [_Server(hub, _Handler, port), _Server(hub, _Storage, 0)]
    hub.endpoint, hub.storage = (f"http://127.0.0.1:{s.server_address[1]}" for s in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,)) for server in servers]
    for thread in threads:
        thread.start()
    hub.ended.clear()
    try:
        yield hub
    finally:
        hub.ended.set()
        for server, thread in zip(servers, threads, strict=True):
            server.end()
            thread.join()
