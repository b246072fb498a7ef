"""A job's events: read in pages, or followed as they happen."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import redis
import redis.asyncio

from worker.contract import JobEvent
from worker.errors import StoreUnavailable
from worker.store.connection import Connection
from worker.store.records import as_event
from worker.terms import EventType

FINAL = frozenset({EventType.SUCCEEDED, EventType.FAILED, EventType.CANCELLED})
_BLOCK_MS = 10_000


def stream_of(job_id: str) -> str:
    """Return the key of a job's stream."""
    return f"pissa:job:{job_id}:events"


class Events:
    """The event streams of all jobs."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def page(self, job_id: str, after: str | None, limit: int) -> tuple[list[JobEvent], str | None]:
        """Return up to `limit` events after a cursor, and the cursor to ask on with.

        The cursor is None once the job has ended and nothing is left to come.
        """
        start = "-" if after is None else f"({after}"
        client = self._connection.client
        entries: Any = self._connection.ask(
            lambda: client.xrange(stream_of(job_id), min=start, count=limit + 1)
        )
        page = [as_event(entry_id, fields) for entry_id, fields in entries[:limit]]
        if len(entries) > limit:
            return page, page[-1].id
        last = page[-1] if page else self._last(job_id)
        ended = last is not None and last.type in FINAL
        return page, None if ended else (page[-1].id if page else after)

    def wait(self, job_id: str, after: str, timeout_s: float) -> list[JobEvent]:
        """Return events after a cursor, waiting up to `timeout_s` for the first."""
        block = max(1, min(int(timeout_s * 1000), _BLOCK_MS))
        client = self._connection.client
        answer: Any = self._connection.ask(
            lambda: client.xread({stream_of(job_id): after}, block=block, count=100)
        )
        return [as_event(*entry) for _, entries in answer or () for entry in entries]

    async def follow(self, job_id: str, after: str | None) -> AsyncIterator[JobEvent]:
        """Yield events after a cursor as they happen, until the job has ended.

        Raises:
            StoreUnavailable: if the store goes away; the last id seen goes on from there.
        """
        client = redis.asyncio.Redis.from_url(
            self._connection.url,
            decode_responses=True,
            socket_connect_timeout=5.0,
            # The client's own default is shorter than a quiet job keeps us waiting.
            socket_timeout=2 * _BLOCK_MS / 1000,
        )
        try:
            async for event in _follow(client, stream_of(job_id), after or "0-0"):
                yield event
        except (redis.ConnectionError, redis.TimeoutError) as error:
            raise StoreUnavailable("the job store does not answer") from error
        finally:
            await client.aclose()

    def _last(self, job_id: str) -> JobEvent | None:
        client = self._connection.client
        entries: Any = self._connection.ask(lambda: client.xrevrange(stream_of(job_id), count=1))
        return as_event(*entries[0]) if entries else None


async def _follow(
    client: redis.asyncio.Redis, stream: str, position: str
) -> AsyncIterator[JobEvent]:
    while True:
        answer: Any = await client.xread({stream: position}, count=100)
        for _, entries in answer or ():
            for entry in entries:
                yield as_event(*entry)
                position = entry[0]
        if answer:
            continue
        # Nothing is left to read: a final event at the very end means that nothing will come. A
        # job that was resumed has a final event in the middle, and one deleted has none at all.
        newest: Any = await client.xrevrange(stream, count=1)
        ended = not newest or as_event(*newest[0]).type in FINAL
        if ended and (not newest or newest[0][0] == position or _before(newest[0][0], position)):
            return
        await client.xread({stream: position}, count=1, block=_BLOCK_MS)


def _before(first: str, second: str) -> bool:
    return tuple(map(int, first.split("-"))) < tuple(map(int, second.split("-")))
