"""From the bytes of a request's body to a request that can be submitted, or the reason why not."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, from_json

from app.errors import InvalidFields, PayloadTooLarge, RequestTimeout, looks_like_hub_token
from pissa_core.errors import InvalidConfig, InvalidRequest, OutsideLocalRoot, PissaError
from pissa_core.refs import LocalRef, Ref, parse_output, parse_ref, resolve_local
from pissa_core.wording import wrongs
from worker.contract import BaseToPissa, JobRequest, PissaToLora
from worker.settings import Settings
from worker.terms import SOURCE_FIELDS

MAX_BODY_BYTES = 1 << 20
BODY_S = 30.0
_Value = TypeVar("_Value")

_job_request: TypeAdapter[JobRequest] = TypeAdapter(JobRequest)
_plan_request: TypeAdapter[BaseToPissa] = TypeAdapter(BaseToPissa)


@dataclass(frozen=True, slots=True)
class Intake:
    """An accepted body: what is asked, and a digest that is the same for the same body."""

    request: JobRequest
    digest: str


async def job_body(request: Request) -> Intake:
    """Read the body of a submitted job."""
    return await _intake(request, _job_request)


async def plan_body(request: Request) -> Intake:
    """Read the body of a request for a plan."""
    return await _intake(request, _plan_request)


JobBody = Annotated[Intake, Depends(job_body)]
PlanBody = Annotated[Intake, Depends(plan_body)]


async def _intake(request: Request, schema: TypeAdapter[Any]) -> Intake:
    body = await read_body(request)
    settings: Settings = request.app.state.settings
    # References below the local root are looked up on disk: not on the event loop.
    intake = await run_in_threadpool(accept, body, schema, settings.local_root)
    check_rank(intake.request, settings.max_rank)
    return intake


async def read_body(request: Request) -> bytes:
    """Return the body.

    Raises:
        PayloadTooLarge: as soon as more than `MAX_BODY_BYTES` are announced or have come.
        RequestTimeout: if it takes longer than `BODY_S`.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > MAX_BODY_BYTES:
        raise _too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise _too_large()
    except TimeoutError as error:
        raise RequestTimeout(
            f"the body did not come within {BODY_S:g} s", hint="send it without a pause"
        ) from error
    return bytes(body)


def _too_large() -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is larger than {MAX_BODY_BYTES} bytes")


def accept(body: bytes, schema: TypeAdapter[Any], local_root: Path | None) -> Intake:
    """Check everything about a body that can be known without opening anything.

    Raises:
        InvalidFields: for the first thing that is wrong, naming its place.
    """
    data = parse_object(body)
    _check_references(data, local_root)
    request = check(schema, data)
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
    return Intake(request, hashlib.sha256(canonical).hexdigest())


def check_rank(request: JobRequest, ceiling: int | None) -> None:
    """Refuse a rank above the operator's ceiling.

    The ranks of adapters that a job names are for the worker to see, which reads them.

    Raises:
        InvalidFields: naming the field, the rank and the ceiling.
    """
    if ceiling is None:
        return
    for place, rank in _ranks(request):
        # What was trained at rank r is LoRA of rank 2r.
        highest = 2 * ceiling if place[0] == "lora" else ceiling
        if rank > highest:
            loc = ["body", *place]
            message = f"{rank} is above {highest}, the highest rank that this service allows"
            refusal = InvalidConfig(f"{_dotted(loc)}: {message}", hint="ask for a lower rank")
            raise InvalidFields(refusal, [{"loc": loc, "msg": message}])


def _ranks(request: JobRequest) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield every rank that a request asks for, with its place."""
    if isinstance(request, BaseToPissa):
        yield ("pissa", "rank"), request.pissa.rank
        for pattern, rank in (request.pissa.rank_pattern or {}).items():
            yield ("pissa", "rank_pattern", pattern), rank
    elif isinstance(request, PissaToLora) and request.lora.rank is not None:
        yield ("lora", "rank"), request.lora.rank


def parse_object(body: bytes) -> dict[str, Any]:
    """Read a JSON object, strictly: UTF-8, no NaN, no lone surrogates, no bottomless nesting."""
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidFields(
            InvalidRequest(f"the body is not JSON: {error}"),
            [{"loc": ["body"], "msg": str(error)}],
        ) from error
    if not isinstance(data, dict):
        raise InvalidFields(
            InvalidRequest(f"the body must be a JSON object, not {_kind_of(data)}"),
            [{"loc": ["body"], "msg": "an object is needed"}],
        )
    for place, text in _strings(data, ("body",)):
        if looks_like_hub_token(text):
            raise InvalidFields(
                InvalidRequest(
                    f"{_dotted(place)} holds what looks like a token of the Hub; bodies are kept",
                    hint="send a token in the header X-Hub-Token, and replace this one",
                ),
                [{"loc": list(place), "msg": "looks like a token"}],
            )
    return data


def check(schema: TypeAdapter[_Value], data: object) -> _Value:
    """Validate `data` without reading one type as another ("16" is no rank, 0 is not false).

    A fault below `pissa` or `lora` is the config's, any other the request's.
    """
    try:
        return schema.validate_python(data, strict=True)
    except ValidationError as error:
        found = [_of_the_kind(item) for item in error.errors(include_url=False)]
        # What another kind of job lacks or has too much says nothing of this one.
        found = [item for item in found if item["loc"] == ("kind",)] or found
        places = [
            {"loc": ["body", *wrong.place], "msg": wrong.why} for wrong in wrongs(found, data)
        ]
        loc, message = places[0]["loc"], places[0]["msg"]
        refusal = InvalidConfig if loc[1:2] in (["pissa"], ["lora"]) else InvalidRequest
        raise InvalidFields(refusal(f"{_dotted(loc)}: {message}"), places) from error


def _of_the_kind(item: ErrorDetails) -> ErrorDetails:
    # Which kinds there are is a fault of the whole body to pydantic.
    if item["type"] != "unknown_kind":
        return item
    return {**item, "loc": ("kind",), "input": item["input"].get("kind")}


def _check_references(data: Mapping[str, Any], local_root: Path | None) -> None:
    """Refuse a reference that is none, or that leaves the folder the service may touch."""
    for place, text in _references(data):
        try:
            reference = _read(place, text, data)
            if isinstance(reference, LocalRef):
                _check_local(reference, local_root)
        except PissaError as error:
            raise InvalidFields(error, [{"loc": ["body", *place], "msg": error.message}]) from error


def _read(place: tuple[str, ...], text: str, data: Mapping[str, Any]) -> Ref:
    if place[0] != "output":
        return parse_ref(text)
    output = data["output"]
    branch = output.get("branch") if isinstance(output, Mapping) else None
    return parse_output(text, branch if isinstance(branch, str) else None)


def _references(data: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    for field in SOURCE_FIELDS:
        if isinstance(data.get(field), str):
            yield (field,), data[field]
    output = data.get("output")
    if isinstance(output, str):
        yield ("output",), output
    elif isinstance(output, Mapping) and isinstance(output.get("ref"), str):
        yield ("output", "ref"), output["ref"]


def _check_local(reference: LocalRef, local_root: Path | None) -> None:
    if local_root is None:
        raise OutsideLocalRoot(
            f"{reference.path!r} is a local folder, and this service takes Hub references only",
            hint="the operator can allow one folder with PISSA_LOCAL_ROOT",
        )
    resolve_local(reference, local_root)


def _strings(value: object, place: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Yield every string in JSON data, keys included, with its place."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield place, key
            yield from _strings(item, (*place, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strings(item, (*place, index))


def _dotted(place: Sequence[Any]) -> str:
    return ".".join(str(part) for part in place[1:]) or "the body"


def _kind_of(value: object) -> str:
    names: dict[type, str] = {list: "an array", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


async def optional_object(request: Request) -> dict[str, Any]:
    """Read a body that may be left out."""
    body = await read_body(request)
    return parse_object(body) if body.strip() else {}
