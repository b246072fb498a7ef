"""A job's events: a page of them as JSON, or all of them as they happen (server-sent events)."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from app.auth import Asking
from app.limits import Limits
from app.openapi import answer, problems
from app.routes.deps import OwnJob, Store
from app.schemas import EVENT_EXAMPLE, EventList
from worker.contract import Job, JobEvent
from worker.errors import StoreUnavailable
from worker.store import JobStore

PING_S = 15
EVENT_STREAM = "text/event-stream"
_CURSOR = r"^([0-9]{1,18}(-[0-9]{1,18})?)?$"
_STREAMED = f"id: {EVENT_EXAMPLE['id']}\r\nevent: {EVENT_EXAMPLE['type']}\r\ndata: {{…}}\r\n\r\n"

logger = logging.getLogger(__name__)
router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

_ok = answer("A page, or a stream", {"events": [EVENT_EXAMPLE], "next": None})
_text = {"type": "string"}
_ok["content"][EVENT_STREAM] = {
    # Of one event, as its lines name them; `data` is the event as JSON.
    "schema": {"type": "object", "properties": {"id": _text, "event": _text, "data": _text}},
    "example": _STREAMED,
}


@router.get(
    "/{job_id}/events",
    summary="Follow a job",
    response_model=EventList,
    responses={
        200: _ok,
        204: {"description": "The job is finished and nothing came after Last-Event-ID"},
        **problems(401, 403, 404, 422, 503),
    },
)
async def job_events(
    request: Request,
    caller: Asking,
    job: OwnJob,
    store: Store,
    after: Annotated[
        str | None, Query(pattern=_CURSOR, description="an event's id; empty: from the first")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="JSON only")] = 1000,
    last_event_id: Annotated[str | None, Header(pattern=_CURSOR)] = None,
    accept: Annotated[str, Header()] = "*/*",
) -> Response | EventList:
    """Return events after a cursor.

    JSON if `after` is given or JSON alone is accepted; otherwise a stream of server-sent events
    that begins after Last-Event-ID and ends when the job does. 204 tells a browser's EventSource
    not to come back.
    """
    start = last_event_id or after or None
    if not _wants_stream(accept, after):
        events, following = await run_in_threadpool(store.events, job.id, after=start, limit=limit)
        return EventList(events=events, next=following)
    if job.status.final and start and not await _any_left(store, job, start):
        return Response(status_code=204)
    limits: Limits = request.app.state.limits
    stream = limits.stream(caller.owner, _stream(store, job.id, start))
    return _Counted(stream, partial(limits.let_go, caller.owner, stream))


class _Counted(EventSourceResponse):
    """A stream that says when it is over; a reader who left would be counted until it is swept."""

    def __init__(self, events: AsyncIterator[ServerSentEvent], at_end: Callable[[], None]) -> None:
        super().__init__(events, ping=PING_S)
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()


def _wants_stream(accept: str, after: str | None) -> bool:
    if EVENT_STREAM in accept:
        return True
    return after is None and "application/json" not in accept


async def _any_left(store: JobStore, job: Job, after: str) -> bool:
    events, _ = await run_in_threadpool(store.events, job.id, after=after, limit=1)
    return bool(events)


async def _stream(
    store: JobStore, job_id: str, after: str | None
) -> AsyncIterator[ServerSentEvent]:
    try:
        async for event in store.follow(job_id, after=after):
            yield _as_sent(event)
    except StoreUnavailable:
        # The client comes back with the last id it saw, and is told 503 then.
        logger.warning("events end early: the store is away", extra={"job_id": job_id})


def _as_sent(event: JobEvent) -> ServerSentEvent:
    return ServerSentEvent(id=event.id, event=event.type.value, data=event.model_dump_json())
