"""The job store as whoever looks at jobs sees it: one, a page, events, manifests, workers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Collection, Mapping
from typing import Any

from pissa_core.errors import InvalidRequest
from worker.contract import Job, JobEvent
from worker.errors import JobNotFound
from worker.settings import Settings
from worker.store.connection import Connection
from worker.store.events import Events
from worker.store.figures import Figures, as_figures
from worker.store.manifest import rows_so_far
from worker.store.records import WorkerInfo, as_job
from worker.terms import Status

_CHUNK = 200

# Inside the class `list` is the method.
Jobs = list[Job]
JobEvents = list[JobEvent]
Workers = list[WorkerInfo]
Ids = list[str]


class JobReader:
    """Every job there is, in Valkey, as it is now; changes nothing."""

    def __init__(self, connection: Connection, *, settings: Settings) -> None:
        """Take an open connection."""
        self.connection = connection
        self._settings = settings
        self._events = Events(connection)

    def ping(self) -> None:
        """Ask whether the store takes a write, as a job would be; one that only reads is no use.

        Raises:
            StoreUnavailable: if it does not.
        """
        self.connection.call("ready")

    def close(self) -> None:
        """Close every connection."""
        self.connection.close()

    def get(self, job_id: str, *, owner: str | None = None) -> Job:
        """Return a job.

        Raises:
            JobNotFound: if there is none, or it belongs to another than `owner`.
        """
        job = self._many([job_id], owner=owner)
        if not job:
            raise no_such_job(job_id)
        return job[0]

    def list(
        self,
        *,
        owner: str | None,
        statuses: Collection[Status] = (),
        limit: int = 50,
        after: str | None = None,
    ) -> tuple[Jobs, str | None]:
        """Return jobs, newest first, and the cursor of the next page if there is one.

        Raises:
            InvalidRequest: if `after` is no cursor of this list.
        """
        index = "pissa:jobs" if owner is None else f"pissa:jobs:{owner}"
        position = _cursor(after)
        found: Jobs = []
        while len(found) <= limit:
            ids, position = self._older(index, position)
            if not ids:
                break
            found += self._many(ids, owner=owner, statuses=statuses)
        page = found[:limit]
        return page, self._seq(page[-1].id) if len(found) > limit else None

    def events(
        self, job_id: str, *, after: str | None = None, limit: int = 1000
    ) -> tuple[JobEvents, str | None]:
        """Return a page of events, and the cursor to ask on with; None once nothing will come."""
        return self._events.page(job_id, after, limit)

    async def follow(self, job_id: str, *, after: str | None) -> AsyncIterator[JobEvent]:
        """Yield events as they happen, up to and with the final one."""
        async for event in self._events.follow(job_id, after):
            yield event

    def manifest(self, job_id: str) -> dict[str, Any]:
        """Return the published manifest, or what is known of it so far.

        Raises:
            JobNotFound: if there is no such job.
        """
        key, client = f"pissa:job:{job_id}:manifest", self.connection.client
        published = self.connection.ask(lambda: client.get(key))
        if published is not None:
            manifest: dict[str, Any] = json.loads(str(published))
            return manifest
        return rows_so_far(self.connection, self.get(job_id))

    def workers(self) -> Workers:
        """Return the workers that have been heard of lately."""
        entries = self.connection.call("workers")["workers"] or []
        leases = self.connection.call("leases")["leases"] or []
        busy = {lease["worker"] for lease in leases}
        latest_ms = 1000 * self._settings.lease_s
        return [_worker(entry, busy) for entry in entries if entry["ago_ms"] <= latest_ms]

    def counts(self) -> dict[Status, int]:
        """Return how many jobs there are in each state."""
        return dict(self.figures().jobs)

    def figures(self) -> Figures:
        """Return what is counted of jobs and their work, at one moment."""
        return as_figures(self.connection.call("figures"))

    def _many(
        self, ids: Collection[str], *, owner: str | None, statuses: Collection[Status] = ()
    ) -> Jobs:
        def read() -> Any:
            pipeline = self.connection.client.pipeline(transaction=False)
            pipeline.time()
            for job_id in ids:
                pipeline.hgetall(f"pissa:job:{job_id}")
            return pipeline.execute()

        (seconds, micros), *hashes = self.connection.ask(read)
        now_ms = seconds * 1000 + micros // 1000
        return [
            as_job(job_id, fields, now_ms)
            for job_id, fields in zip(ids, hashes, strict=True)
            if _shown(fields, owner, statuses)
        ]

    def _older(self, index: str, position: str) -> tuple[Ids, str]:
        client = self.connection.client
        entries: Any = self.connection.ask(
            lambda: client.zrevrangebyscore(
                index, position, "-inf", start=0, num=_CHUNK, withscores=True
            )
        )
        last = f"({int(entries[-1][1])}" if entries else position
        return [job_id for job_id, _ in entries], last

    def _seq(self, job_id: str) -> str:
        client = self.connection.client
        return str(self.connection.ask(lambda: client.hget(f"pissa:job:{job_id}", "seq")))


def _shown(fields: Mapping[str, str], owner: str | None, statuses: Collection[Status]) -> bool:
    if "status" not in fields or "hidden" in fields or fields["kind"] == "plan":
        return False
    if owner is not None and fields["owner"] != owner:
        return False
    return not statuses or fields["status"] in statuses


def _worker(entry: Mapping[str, Any], busy: Collection[str]) -> WorkerInfo:
    record = json.loads(entry["record"])
    return WorkerInfo(
        name=entry["name"],
        device=record["device"],
        busy=entry["name"] in busy,
        seen_s=entry["ago_ms"] / 1000,
        queues=tuple(record["queues"]),
    )


def no_such_job(job_id: str) -> JobNotFound:
    """Return the error for an id that names no job."""
    return JobNotFound(f"there is no job {job_id[:80]!r}")


def _cursor(after: str | None) -> str:
    if after is None:
        return "+inf"
    if not after.isascii() or not after.isdigit() or len(after) > 15:
        raise InvalidRequest(f"{after[:80]!r} is not a cursor", hint="use `next` of the last page")
    return f"({after}"
