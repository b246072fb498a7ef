"""Around every request: an id, security headers, and an answer to what nobody foresaw."""

from __future__ import annotations

import logging
import re
import time
import uuid

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import internal_problem
from app.traffic import Traffic, route_of

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
SECURITY_HEADERS = {
    # The strictest policy is the default; the pages loosen it for what they need.
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
_ROUTINE = frozenset({"/livez", "/readyz", "/metrics", "/web", "/swagger"})

logger = logging.getLogger(__name__)


class Guard:
    """ASGI middleware: `X-Request-ID`, security headers, and a problem document for a crash.

    It stands inside Starlette's own handler of last resort, whose answer would lack all three.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        started = False
        begun = time.perf_counter()

        async def send_guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                _note(scope, message["status"], time.perf_counter() - begun)
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self.app(scope, receive, send_guarded)
            except ClientDisconnect:
                logger.info("the client left before its request was read")
            except Exception:
                if started:
                    raise  # Half an answer is out: only a broken connection says that it is half.
                logger.exception("request %s failed", request_id)
                await internal_problem(request_id)(scope, receive, send_guarded)


def _note(scope: Scope, status: int, seconds: float) -> None:
    traffic: Traffic = scope["app"].state.traffic
    method, route = scope["method"], route_of(scope)
    traffic.count(method, route, status, seconds)
    # Probes and scrapes come every few seconds and are news only when they fail.
    routine = route in _ROUTINE and status < 400
    logger.log(
        logging.DEBUG if routine else logging.INFO,
        "answered",
        extra={"method": method, "route": route, "status": status, "ms": round(1000 * seconds, 1)},
    )


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
