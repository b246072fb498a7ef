"""The OpenAPI document: what FastAPI derives, the bodies we read ourselves, and every error."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from app.errors import PROBLEM_JSON, RETRY_AFTER_S
from app.schemas import CancelBody, Problem
from worker.contract import BaseToPissa, PissaToBase, PissaToLora, Verify

Responses = dict[int | str, dict[str, Any]]

_REQUESTS = (BaseToPissa, PissaToLora, PissaToBase, Verify)
JOB_REQUESTS = tuple(model.__name__ for model in _REQUESTS)
"""The schemas of a job's body, a kind each."""

_REF = "#/components/schemas/{model}"
_EXAMPLES: dict[int, tuple[str, str]] = {
    401: ("unauthorized", "this service needs an API key"),
    403: ("forbidden", "without API keys this service answers only to this machine"),
    404: ("not_found", "there is no job 'job_0193f2a8c4e17d5b'"),
    408: ("request_timeout", "the body did not come within 30 s"),
    409: ("conflict", "the job is running; only finished jobs can be deleted"),
    413: ("payload_too_large", "the body is larger than 1048576 bytes"),
    416: ("range_not_satisfiable", "the range begins behind the end of the file, 640 bytes"),
    422: ("invalid_config", "pissa.rank: Input should be greater than or equal to 1 (got 0)"),
    429: ("too_many_requests", "more than 6000 times within a minute: request"),
    500: ("internal", "something went wrong inside the service"),
    503: ("store_unavailable", "the job store does not answer"),
    504: ("plan_timeout", "the plan was not ready within 30 seconds"),
}


def problems(*statuses: int) -> Responses:
    """Return the documentation of the error answers a route can give, and 500."""
    # Whoever needs a key is also counted.
    counted = (429,) if 401 in statuses else ()
    # Whatever has a body may not get it.
    awaited = (408,) if 413 in statuses else ()
    return {status: _documented(status) for status in sorted({*statuses, *counted, *awaited, 500})}


def _documented(status: int) -> dict[str, Any]:
    code, detail = _EXAMPLES[status]
    phrase = HTTPStatus(status).phrase
    example = {
        "type": "about:blank",
        "title": phrase,
        "status": status,
        "detail": detail,
        "code": code,
        "hint": None,
        "errors": [],
    }
    answer: dict[str, Any] = {
        "description": phrase,
        "content": {
            PROBLEM_JSON: {"schema": {"$ref": _REF.format(model="Problem")}, "example": example}
        },
    }
    if status in (429, 503, 504):
        answer["headers"] = {"Retry-After": _header("integer", RETRY_AFTER_S)}
    if status == 401:
        answer["headers"] = {"WWW-Authenticate": _header("string", 'Bearer realm="pissa"')}
    return answer


def _header(kind: str, example: object) -> dict[str, Any]:
    return {"schema": {"type": kind}, "example": example}


def answer(description: str, example: object, **headers: object) -> dict[str, Any]:
    """Return the documentation of a JSON answer, with an example of each header it carries."""
    documented: dict[str, Any] = {
        "description": description,
        "content": {"application/json": {"example": example}},
    }
    if headers:
        documented["headers"] = {
            name.replace("_", "-"): _header("string", value) for name, value in headers.items()
        }
    return documented


def body_of(
    models: Sequence[str], examples: dict[str, Any], *, required: bool = True
) -> dict[str, Any]:
    """Return `openapi_extra` for a JSON body that the route reads by itself; one of `models`."""
    references = [{"$ref": _REF.format(model=model)} for model in models]
    # No discriminator: a body without a kind is for the first, which OpenAPI cannot say with one.
    schema = references[0] if len(references) == 1 else {"oneOf": references}
    content = {"schema": schema, "examples": examples}
    return {"requestBody": {"required": required, "content": {"application/json": content}}}


def document(app: FastAPI) -> dict[str, Any]:
    """Build the document once, and add the schemas that no route declares to FastAPI."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title,
            version=app.version,
            summary=app.summary,
            description=app.description,
            routes=app.routes,
            tags=app.openapi_tags,
        )
        _, definitions = models_json_schema(
            [(model, "validation") for model in (*_REQUESTS, CancelBody, Problem)],
            ref_template=_REF,
        )
        schema["components"]["schemas"] |= definitions["$defs"]
        if not app.state.api_keys:
            _make_keys_optional(schema)
        app.openapi_schema = schema
    return app.openapi_schema


def _make_keys_optional(schema: dict[str, Any]) -> None:
    """Say that no key is needed, where the service has none."""
    for path in schema["paths"].values():
        for operation in path.values():
            if "security" in operation:
                operation["security"].insert(0, {})
