"""The job store as the API sees it: submit, look, cancel, resume, delete, follow, plans."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import AsyncIterator, Collection, Mapping
from typing import Any

from pydantic import TypeAdapter

from pissa_core.errors import InvalidRequest
from worker.contract import BaseToPissa, Job, JobEvent, JobRequest, Status
from worker.errors import (
    Conflict,
    IdempotencyMismatch,
    JobNotFound,
)
from worker.places import Storages, queue_names
from worker.settings import Settings
from worker.store.connection import Connection
from worker.store.events import Events
from worker.store.manifest import rows_so_far
from worker.store.plans import wait_for_plan
from worker.store.records import WorkerInfo, as_job
from worker.vault import Vault

_CHUNK = 200
_OWNER_OF_PLANS = ""
_request: TypeAdapter[JobRequest] = TypeAdapter(JobRequest)

# Inside the class `list` is the method.
Jobs = list[Job]
JobEvents = list[JobEvent]
Workers = list[WorkerInfo]
Ids = list[str]


class JobStore:
    """Every job there is, in Valkey; what this returned survives any process's death."""

    def __init__(
        self, connection: Connection, *, vault: Vault, shared: Storages, settings: Settings
    ) -> None:
        """Take what `worker.connect.open_store` puts together."""
        self.connection = connection
        self._vault = vault
        self._shared = shared
        self._settings = settings
        self._events = Events(connection)

    def ping(self) -> None:
        """Ask whether the store answers.

        Raises:
            StoreUnavailable: if it does not.
        """
        self.connection.ask(self.connection.client.ping)

    def close(self) -> None:
        """Close every connection."""
        self.connection.close()

    def submit(
        self,
        request: JobRequest,
        *,
        owner: str,
        idempotency_key: str | None = None,
        body_digest: str | None = None,
        hub_token: str | None = None,
    ) -> tuple[Job, bool]:
        """Accept a job, durably; return it, and whether it is new.

        Raises:
            IdempotencyMismatch: if the key was used with another body.
            StoreUnavailable: if nothing was accepted, or that is not known.
        """
        text = request.model_dump_json()
        answer = self._submit(
            f"job_{_random_name()}",
            request,
            kind=request.kind,
            owner=owner,
            token=self._vault.seal(hub_token),
            idem=None if idempotency_key is None else _idempotency(owner, idempotency_key),
            body_digest=body_digest or hashlib.sha256(text.encode()).hexdigest(),
        )
        if answer.get("mismatch"):
            raise IdempotencyMismatch(
                "this Idempotency-Key was used before with another body",
                hint="use a new key for a new job",
            )
        return self.get(answer["id"]), answer["created"]

    def get(self, job_id: str, *, owner: str | None = None) -> Job:
        """Return a job.

        Raises:
            JobNotFound: if there is none, or it belongs to another than `owner`.
        """
        job = self._many([job_id], owner=owner)
        if not job:
            raise _not_found(job_id)
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

    def cancel(self, job_id: str, *, discard: bool) -> Job:
        """Ask a job to stop; it is `cancelled` once nothing of it runs any more.

        Raises:
            JobNotFound, Conflict: if it has succeeded or failed.
        """
        self._change(
            job_id, "cancelled", self.connection.call("cancel", id=job_id, discard=discard)
        )
        return self.get(job_id)

    def resume(self, job_id: str, *, hub_token: str | None) -> Job:
        """Queue a failed or cancelled job again; sealed work is not done twice.

        Raises:
            JobNotFound, Conflict: if it is neither failed nor cancelled.
        """
        request = _request.validate_python(self.get(job_id).request)
        plan_queue, work_queue = queue_names(request, self._shared)
        answer = self.connection.call(
            "resume",
            id=job_id,
            nonce=secrets.token_hex(8),
            token=self._vault.seal(hub_token),
            plan_queue=plan_queue,
            work_queue=work_queue,
        )
        self._change(job_id, "resumed", answer)
        return self.get(job_id)

    def delete(self, job_id: str) -> None:
        """Remove a job that has ended, its events and its kept files.

        Raises:
            JobNotFound, Conflict: if it has not ended.
        """
        self._change(job_id, "deleted", self.connection.call("delete", id=job_id))
        shutil.rmtree(self._settings.files_dir / job_id, ignore_errors=True)

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
        client = self.connection.client
        counted: Any = self.connection.ask(lambda: client.hgetall("pissa:counts"))
        return {status: int(counted.get(status, 0)) for status in Status}

    def request_plan(self, request: BaseToPissa, *, hub_token: str | None) -> str:
        """Ask a planner for a plan; return the id to wait for."""
        answer = self._submit(
            f"plan_{_random_name()}",
            request,
            kind="plan",
            owner=_OWNER_OF_PLANS,
            token=self._vault.seal(hub_token),
        )
        plan_id: str = answer["id"]
        return plan_id

    def plan_result(self, plan_id: str, *, timeout_s: float) -> dict[str, Any]:
        """Wait for a plan and return it.

        Raises:
            PlanTimeout: if it is not there in time; asking again goes on waiting.
            PissaError: what the planner met.
        """
        return wait_for_plan(self.connection, self._events, plan_id, timeout_s)

    def _submit(self, job_id: str, request: JobRequest, **fields: Any) -> dict[str, Any]:
        plan_queue, work_queue = queue_names(request, self._shared)
        return self.connection.call(
            "submit",
            id=job_id,
            request=request.model_dump_json(),
            plan_queue=plan_queue,
            work_queue=work_queue,
            **fields,
        )

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

    def _change(self, job_id: str, verb: str, answer: Mapping[str, Any]) -> None:
        if answer.get("missing"):
            raise _not_found(job_id)
        state = answer.get("conflict")
        if state == "published":
            raise Conflict(f"{job_id} cannot be {verb}: its result has just been published")
        if state is not None:
            raise Conflict(f"{job_id} cannot be {verb}: it is {state}", hint=_HINTS.get(verb))


_HINTS = {
    "resumed": "only a failed or cancelled job can be resumed",
    "deleted": "cancel it first",
}


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


def _not_found(job_id: str) -> JobNotFound:
    return JobNotFound(f"there is no job {job_id[:80]!r}")


def _random_name() -> str:
    return secrets.token_hex(10)


def _idempotency(owner: str, key: str) -> str:
    digest = hashlib.sha256(json.dumps([owner, key]).encode()).hexdigest()
    return f"pissa:idempotency:{digest}"


def _cursor(after: str | None) -> str:
    if after is None:
        return "+inf"
    if not after.isascii() or not after.isdigit() or len(after) > 15:
        raise InvalidRequest(f"{after[:80]!r} is not a cursor", hint="use `next` of the last page")
    return f"({after}"
