"""Every error as RFC 9457 `application/problem+json`: which status, which words, no secret.

::

    PissaError
    └── HttpError                what only HTTP can say; `status` stands in the class
        ├── Unauthorized         unauthorized             401
        ├── Forbidden            forbidden                403
        ├── NoSuchRoute          not_found                404
        ├── MethodNotAllowed     method_not_allowed       405
        ├── RequestTimeout       request_timeout          408
        ├── PayloadTooLarge      payload_too_large        413
        ├── RangeNotSatisfiable  range_not_satisfiable    416
        └── TooManyRequests      too_many_requests        429

The status of every other code stands in `STATUS`, or follows from its class.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

from pissa_core.errors import (
    CheckpointError,
    InvalidRequest,
    OutputError,
    PissaError,
    Refused,
    ResourceError,
    TargetError,
    WayBackError,
)
from pissa_core.wording import sentence_of

PROBLEM_JSON = "application/problem+json"
RETRY_AFTER_S = 5

logger = logging.getLogger(__name__)

STATUS: Mapping[str, HTTPStatus] = {
    "repo_not_found": HTTPStatus.NOT_FOUND,
    "revision_not_found": HTTPStatus.NOT_FOUND,
    "folder_not_found": HTTPStatus.NOT_FOUND,
    "not_found": HTTPStatus.NOT_FOUND,
    "gated_repo": HTTPStatus.FORBIDDEN,
    "no_read_access": HTTPStatus.FORBIDDEN,
    "no_write_access": HTTPStatus.FORBIDDEN,
    "token_invalid": HTTPStatus.UNAUTHORIZED,
    "conflict": HTTPStatus.CONFLICT,
    "too_many_requests": HTTPStatus.TOO_MANY_REQUESTS,
    "idempotency_mismatch": HTTPStatus.UNPROCESSABLE_ENTITY,
    "rate_limited": HTTPStatus.TOO_MANY_REQUESTS,
    "hub_unavailable": HTTPStatus.SERVICE_UNAVAILABLE,
    "download_corrupt": HTTPStatus.SERVICE_UNAVAILABLE,
    "source_changed": HTTPStatus.SERVICE_UNAVAILABLE,
    "store_unavailable": HTTPStatus.SERVICE_UNAVAILABLE,
    "no_suitable_worker": HTTPStatus.SERVICE_UNAVAILABLE,
    "worker_lost": HTTPStatus.SERVICE_UNAVAILABLE,
    "attempts_exhausted": HTTPStatus.SERVICE_UNAVAILABLE,
    "plan_timeout": HTTPStatus.GATEWAY_TIMEOUT,
    "cancelled": HTTPStatus.CONFLICT,
}
_UNPROCESSABLE = (
    Refused, CheckpointError, TargetError, OutputError, ResourceError, WayBackError
)  # fmt: skip
_TRY_AGAIN = (
    HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT
)  # fmt: skip


class HttpError(PissaError):
    """An error that only HTTP knows."""

    status: ClassVar[HTTPStatus] = HTTPStatus.INTERNAL_SERVER_ERROR


class Unauthorized(HttpError):
    """No API key was given, or one that the service does not know."""

    code = "unauthorized"
    status = HTTPStatus.UNAUTHORIZED


class Forbidden(HttpError):
    """The service is open to this machine only, and the request comes from elsewhere."""

    code = "forbidden"
    status = HTTPStatus.FORBIDDEN


class NoSuchRoute(HttpError):
    """There is no such route."""

    code = "not_found"
    status = HTTPStatus.NOT_FOUND


class MethodNotAllowed(HttpError):
    """The route exists, the method does not."""

    code = "method_not_allowed"
    status = HTTPStatus.METHOD_NOT_ALLOWED


class RequestTimeout(HttpError):
    """The body was announced and did not come."""

    code = "request_timeout"
    status = HTTPStatus.REQUEST_TIMEOUT


class PayloadTooLarge(HttpError):
    """The request's body is larger than the service reads."""

    code = "payload_too_large"
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class RangeNotSatisfiable(HttpError):
    """The range asked for begins behind the end of the file."""

    code = "range_not_satisfiable"
    status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE

    def __init__(self, message: str, *, hint: str | None = None, size: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.size = size


class TooManyRequests(HttpError):
    """More at once than the service carries."""

    code = "too_many_requests"
    status = HTTPStatus.TOO_MANY_REQUESTS

    def __init__(
        self, message: str, *, hint: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


def status_of(error: PissaError) -> HTTPStatus:
    """Return the HTTP status that tells of `error`."""
    if isinstance(error, HttpError):
        return error.status
    if error.code in STATUS:
        return STATUS[error.code]
    if isinstance(error, _UNPROCESSABLE):
        return HTTPStatus.UNPROCESSABLE_ENTITY
    return HTTPStatus.INTERNAL_SERVER_ERROR


def problem(
    error: PissaError,
    *,
    errors: Sequence[Mapping[str, Any]] = (),
    secrets: Sequence[str] = (),
    headers: Mapping[str, str] | None = None,
    **members: object,
) -> JSONResponse:
    """Return `error` as a problem document; `members` are added to it.

    Args:
        error: the error.
        errors: which places of the request are wrong, each ``{"loc", "msg"}``.
        secrets: what the request brought that must not come back.
        headers: headers of the answer beside those that the status calls for.
        members: further members of the document.
    """
    status = status_of(error)
    document = {
        "type": "about:blank",
        "title": status.phrase,
        "status": int(status),
        "detail": error.message,
        "code": error.code,
        "hint": error.hint,
        "errors": list(errors),
        **members,
    }
    return JSONResponse(
        redacted(document, secrets),
        status_code=status,
        headers={**_headers(error, status), **(headers or {})},
        media_type=PROBLEM_JSON,
    )


def _headers(error: PissaError, status: HTTPStatus) -> dict[str, str]:
    headers = {"Cache-Control": "no-store"}
    if error.code == "unauthorized":
        headers["WWW-Authenticate"] = 'Bearer realm="pissa"'
    elif status == HTTPStatus.UNAUTHORIZED:
        # RFC 9110 wants a challenge with every 401; this one says that the Hub is meant.
        headers["WWW-Authenticate"] = 'X-Hub-Token realm="hub"'
    if isinstance(error, RangeNotSatisfiable) and error.size is not None:
        headers["Content-Range"] = f"bytes */{error.size}"
    if status in _TRY_AGAIN:
        headers["Retry-After"] = str(getattr(error, "retry_after_s", None) or RETRY_AFTER_S)
    return headers


_HUB_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")


def looks_like_hub_token(text: str) -> bool:
    """Say whether `text` holds something shaped like a token of the Hub."""
    return _HUB_TOKEN.search(text) is not None


def redacted(value: Any, secrets: Sequence[str] = ()) -> Any:
    """Return JSON data with tokens of the Hub, and every one of `secrets`, made unreadable."""
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, "***")
        return _HUB_TOKEN.sub("hf_***", value)
    if isinstance(value, Mapping):
        return {key: redacted(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, secrets) for item in value]
    return value


def secrets_of(request: Request) -> list[str]:
    """Return what the request's headers brought that no answer may repeat."""
    key = request.headers.get("authorization", "").partition(" ")[2].strip()
    token = request.headers.get("x-hub-token", "").strip()
    # Shorter strings are no secrets, and replacing them would garble the sentence.
    return [secret for secret in (key, token) if len(secret) >= 8]


class InvalidFields(Exception):
    """A refusal together with the places of the request it is about."""

    def __init__(self, cause: PissaError, errors: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(cause.message)
        self.cause = cause
        self.errors = errors


def _on_invalid_fields(request: Request, error: Exception) -> Response:
    assert isinstance(error, InvalidFields)
    return problem(error.cause, errors=error.errors, secrets=secrets_of(request))


def _on_pissa_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PissaError)
    if status_of(error) == HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.error("an error without a status of its own", exc_info=error)
    return problem(error, secrets=secrets_of(request))


def _on_invalid_parameters(request: Request, error: Exception) -> Response:
    """Answer for what FastAPI itself checks: parameters of path, query and header."""
    assert isinstance(error, RequestValidationError)
    places = [{"loc": list(item["loc"]), "msg": sentence_of(item)} for item in error.errors()]
    first = places[0]
    where = " ".join(str(part) for part in first["loc"])
    return problem(
        InvalidRequest(f"{where}: {first['msg']}"), errors=places, secrets=secrets_of(request)
    )


def _on_http_exception(request: Request, error: Exception) -> Response:
    """Answer for what the router itself says: no such route, no such method."""
    assert isinstance(error, HTTPException)
    headers = error.headers
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers = {"Allow": ", ".join(_methods_at(request))}
        refusal: PissaError = MethodNotAllowed(
            f"{request.method} is not a method of {request.url.path}",
            hint="see /docs for the routes and their methods",
        )
    elif error.status_code == HTTPStatus.NOT_FOUND:
        refusal = NoSuchRoute(f"there is nothing at {request.url.path}", hint="see /docs")
    else:
        logger.error("the router answered %s: %s", error.status_code, error.detail)
        refusal = PissaError("the request could not be handled")
    return problem(refusal, secrets=secrets_of(request), headers=headers)


def _methods_at(request: Request) -> list[str]:
    """Return every method of the path; the router itself names those of its first match only."""
    app: FastAPI = request.app
    methods: set[str] = set()
    for method in ("GET", "HEAD", "POST", "DELETE"):
        scope = {**request.scope, "method": method}
        if any(route.matches(scope)[0] is Match.FULL for route in app.router.routes):
            methods.add(method)
    return sorted(methods)


def internal_problem(request_id: str) -> JSONResponse:
    """Return the answer to an error that nobody foresaw; the log has the rest."""
    return problem(
        PissaError(
            "something went wrong inside the service; this is not the request's fault",
            hint=f"the service's log tells more under request id {request_id}",
        )
    )


def add_error_handlers(app: FastAPI) -> None:
    """Make every error of `app` a problem document."""
    app.add_exception_handler(PissaError, _on_pissa_error)
    app.add_exception_handler(InvalidFields, _on_invalid_fields)
    app.add_exception_handler(RequestValidationError, _on_invalid_parameters)
    app.add_exception_handler(HTTPException, _on_http_exception)
