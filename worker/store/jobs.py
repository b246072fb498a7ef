"""The job store as the API changes it: submit, cancel, resume, delete, ask for plans."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pydantic import TypeAdapter

from worker.contract import BaseToPissa, Job, JobRequest
from worker.errors import Conflict, IdempotencyMismatch, JobNotFound, QueueFull
from worker.places import Storages, queue_names
from worker.settings import Settings
from worker.store.connection import Connection
from worker.store.plans import wait_for_plan
from worker.store.reading import JobReader, no_such_job
from worker.vault import Vault

_OWNER_OF_PLANS = ""
_request: TypeAdapter[JobRequest] = TypeAdapter(JobRequest)


class JobStore(JobReader):
    """Every job there is, in Valkey; what this returned survives any process's death."""

    def __init__(
        self, connection: Connection, *, vault: Vault, shared: Storages, settings: Settings
    ) -> None:
        """Take what `worker.connect.open_store` puts together."""
        super().__init__(connection, settings=settings)
        self._vault = vault
        self._shared = shared

    def submit(
        self,
        request: JobRequest,
        *,
        owner: str,
        idempotency_key: str | None = None,
        body_digest: str | None = None,
        hub_token: str | None = None,
        request_id: str | None = None,
    ) -> tuple[Job, bool]:
        """Accept a job, durably; return it, and whether it is new.

        The `request_id` goes with it into the workers' logs.

        Raises:
            IdempotencyMismatch: if the key was used with another body.
            QueueFull: if the owner has as many jobs waiting as it may have.
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
            max_queued=self._settings.max_queued,
            request_id=request_id,
        )
        if "full" in answer:
            raise QueueFull(
                f"{answer['full']} jobs are waiting already, as many as one key may have",
                hint="submit again when some have begun, or cancel some",
            )
        if answer.get("mismatch"):
            raise IdempotencyMismatch(
                "this Idempotency-Key was used before with another body",
                hint="use a new key for a new job",
            )
        return self.get(answer["id"]), answer["created"]

    def cancel(self, job_id: str, *, discard: bool) -> Job:
        """Ask a job to stop; it is `cancelled` once nothing of it runs any more.

        Raises:
            JobNotFound, Conflict: if it has succeeded or failed.
        """
        self._change(
            job_id, "cancelled", self.connection.call("cancel", id=job_id, discard=discard)
        )
        return self.get(job_id)

    def resume(self, job_id: str, *, hub_token: str | None, request_id: str | None = None) -> Job:
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
            request_id=request_id,
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

    def delete_finished(self, *, older_s: float) -> int:
        """Delete jobs that ended longer ago than this, as `delete` does; return how many.

        A job that is resumed or deleted meanwhile is left alone.
        """
        ids = self.connection.call("finished_before", age_ms=int(1000 * older_s))["ids"] or []
        gone = 0
        for job_id in ids:
            with suppress(JobNotFound, Conflict):
                self.delete(job_id)
                gone += 1
        return gone

    def request_plan(
        self, request: BaseToPissa, *, hub_token: str | None, request_id: str | None = None
    ) -> str:
        """Ask a planner for a plan; return the id to wait for."""
        answer = self._submit(
            f"plan_{_random_name()}",
            request,
            kind="plan",
            owner=_OWNER_OF_PLANS,
            token=self._vault.seal(hub_token),
            request_id=request_id,
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

    def _change(self, job_id: str, verb: str, answer: Mapping[str, Any]) -> None:
        if answer.get("missing"):
            raise no_such_job(job_id)
        state = answer.get("conflict")
        if state == "published":
            raise Conflict(f"{job_id} cannot be {verb}: its result has just been published")
        if state is not None:
            raise Conflict(f"{job_id} cannot be {verb}: it is {state}", hint=_HINTS.get(verb))


_HINTS = {
    "resumed": "only a failed or cancelled job can be resumed",
    "deleted": "cancel it first",
}


def _random_name() -> str:
    return secrets.token_hex(10)


def _idempotency(owner: str, key: str) -> str:
    digest = hashlib.sha256(json.dumps([owner, key]).encode()).hexdigest()
    return f"pissa:idempotency:{digest}"
