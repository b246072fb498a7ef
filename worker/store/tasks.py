"""The job store as a worker sees it: claim a task, write under its lease, give it back."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from pissa_core.errors import AttemptsExhausted, Cancelled, PissaError
from worker.settings import Settings
from worker.store.connection import Connection


class WorkShard(Protocol):
    """A unit of fan-out: the file it makes or looks at, and the bytes its progress counts."""

    @property
    def path(self) -> str: ...  # noqa: D102
    @property
    def size(self) -> int: ...  # noqa: D102


class Work(Protocol):
    """A plan of any kind: its shards become tasks, its matrices are counted."""

    @property
    def shards(self) -> Sequence[WorkShard]: ...  # noqa: D102
    @property
    def matrices(self) -> Sequence[object]: ...  # noqa: D102
    @property
    def notes(self) -> Sequence[str]: ...  # noqa: D102
    def to_json(self) -> str: ...  # noqa: D102


class LeaseLost(Exception):
    """The task was given to another worker, or its job is over: write nothing more."""


class Stop(StrEnum):
    """Why a worker should leave its task."""

    CANCELLED = "cancelled"
    FAILED = "failed"
    DELETED = "deleted"
    SUCCEEDED = "succeeded"
    DRAIN = "drain"


@dataclass(frozen=True, slots=True)
class Claim:
    """A task under a lease of ours, and what is to be known of its job.

    Attributes:
        task: ``prepare``, ``plan``, ``shard:3``, ``publish`` or ``discard``.
        token: proves that the lease is ours; goes with every write.
        sealed_token: the Hub token as the vault sealed it.
        digest: names the staging area, once the job is planned.
        discard: what a discard task throws away, ``scratch`` or ``all``.
        published: the result is visible already; only the sweep is left.
        request_id: of the request that submitted the job, or resumed it; for the log.
    """

    job_id: str
    task: str
    token: str
    worker: str
    attempts: int
    request: str
    kind: str
    sealed_token: str | None
    digest: str | None
    discard: str | None
    published: bool
    request_id: str | None = None


class TaskStore:
    """Writes about tasks; each is refused with `LeaseLost` when the lease has gone to another."""

    def __init__(self, connection: Connection, settings: Settings, *, worker: str) -> None:
        """Write through `connection` in the name of `worker`."""
        self.connection = connection
        self._settings = settings
        self._worker = worker
        self._plan: tuple[tuple[str, object], str] = ("", None), ""

    def claim(self, job_id: str, task: str, *, holder: str) -> Claim | None:
        """Take a task, or return None if it is done, held by another or no longer wanted.

        Args:
            job_id: the job's id, or a plan's.
            task: the task's name.
            holder: tells the reaper on this machine which process dies with the lease.
        """
        token = secrets.token_hex(8)
        answer = self.connection.call(
            "claim",
            id=job_id,
            task=task,
            token=token,
            worker=self._worker,
            holder=holder,
            lease_ms=int(self._settings.lease_s * 1000),
        )
        if "refused" in answer:
            return None
        request, kind, sealed, digest, discard, published, request_id = answer["job"]
        return Claim(
            job_id=job_id,
            task=task,
            token=token,
            worker=self._worker,
            attempts=answer["attempts"],
            request=request,
            kind=kind,
            sealed_token=sealed or None,
            digest=digest or None,
            discard=discard or None,
            published=bool(published),
            request_id=request_id or None,
        )

    def renew(self, claim: Claim) -> Stop | None:
        """Prolong the lease; say whether to leave the task.

        Raises:
            LeaseLost: if another has it.
        """
        return self._write("renew", claim, lease_ms=int(self._settings.lease_s * 1000))

    def look(self, claim: Claim) -> Stop | None:
        """Ask, without a write, whether to leave the task; raises as `renew` does."""
        return self._write("look", claim)

    def release(self, claim: Claim) -> None:
        """Give the task back, to be taken up again if the job goes on."""
        self._write("release", claim)

    def plan_text(self, job_id: str) -> str:
        """Return the plan that `planned` stored.

        Raises:
            LeaseLost: if the job has none any more, being over or begun anew.
        """
        client, job = self.connection.client, f"pissa:job:{job_id}"
        planned_at = self.connection.ask(lambda: client.hget(job, "shards_at"))
        # A plan of many shards is long, and each of them needs it.
        if planned_at is None or self._plan[0] != (job_id, planned_at):
            text = self.connection.ask(lambda: client.get(f"{job}:plan"))
            if text is None:
                raise LeaseLost(job_id)
            self._plan = (job_id, planned_at), str(text)
        return self._plan[1]

    def rows(self, job_id: str) -> dict[str, Any]:
        """Return every row told so far, by the name it was told under."""
        client = self.connection.client
        stored: Any = self.connection.ask(lambda: client.hgetall(f"pissa:job:{job_id}:rows"))
        return {name: json.loads(row) for name, row in stored.items()}

    def planned(self, claim: Claim, plan: Work, digest: str) -> None:
        """Store the plan and make a task of every shard; ends `prepare`."""
        self._write(
            "planned",
            claim,
            plan=plan.to_json(),
            digest=digest,
            shards=[shard.path for shard in plan.shards],
            matrices=len(plan.matrices),
            bytes=sum(shard.size for shard in plan.shards),
            notes=list(plan.notes),
        )

    def shard_started(self, claim: Claim, shard: str, matrices: int, resumed: int) -> Stop | None:
        """Tell that a shard begins."""
        return self._write("shard_started", claim, shard=shard, matrices=matrices, resumed=resumed)

    def matrix_done(
        self, claim: Claim, row: Mapping[str, Any], *, nbytes: int, seconds: float, resumed: bool
    ) -> Stop | None:
        """Store a row of the manifest and count the matrix, once."""
        event = {
            "module": row["module"],
            "shard": row.get("shard"),
            "energy": row.get("energy"),
            "seconds": round(seconds, 4),
            "resumed": resumed,
        }
        return self._write(
            "matrix_done",
            claim,
            tensor=row["tensor"],
            row=json.dumps(row),
            nbytes=nbytes,
            resumed=resumed,
            event=json.dumps(event),
        )

    def shard_done(
        self,
        claim: Claim,
        shard: str,
        *,
        nbytes: int,
        matrices: int,
        resumed: bool,
        peak: int | None,
        rows: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Count a sealed shard; the last one makes the publish task. `rows`: those not told yet."""
        told = {tensor: json.dumps(row) for tensor, row in (rows or {}).items()}
        self._write(
            "shard_done",
            claim,
            shard=shard,
            nbytes=nbytes,
            matrices=matrices,
            resumed=resumed,
            peak=peak,
            rows=told or None,
        )

    def waiting(self, claim: Claim, error: PissaError, seconds: float) -> None:
        """Tell that the task waits for the Hub, why, and for how long."""
        self._write(
            "waiting", claim, code=error.code, message=error.message, seconds=round(seconds, 3)
        )

    def going_on(self, claim: Claim) -> None:
        """Tell that the task waits no more."""
        self._write("going_on", claim)

    def publishing(self, claim: Claim) -> Stop | None:
        """Tell that the result is being put together."""
        return self._write("publishing", claim)

    def published(
        self, claim: Claim, *, result: Mapping[str, Any], manifest: Mapping[str, Any], peak: int
    ) -> None:
        """Store what is visible now; the job can only succeed from here on."""
        self._write(
            "published",
            claim,
            result=json.dumps(result),
            manifest=json.dumps(manifest),
            peak=peak,
        )

    def finish(self, claim: Claim, result: Mapping[str, Any] | None = None) -> None:
        """End the job with this task: after publish, a discard, or a plan request's plan."""
        self._write("finish", claim, result=None if result is None else json.dumps(result))

    def retry(self, claim: Claim, error: PissaError, *, restart: bool) -> None:
        """Have the task tried again later (with `restart`: the job, from its plan on), or fail.

        Retries that are spent end the job with the error's own code; work that was discarded
        under it every time has none of its own.
        """
        exhausted = None
        if isinstance(error, Cancelled):
            exhausted = json.dumps(_never_left_alone(self._settings.max_retries).as_dict())
        self._write(
            "retry",
            claim,
            error=json.dumps(error.as_dict()),
            restart=restart,
            discard="none",
            retry_ms=int(self._settings.retry_s * 1000),
            max_retries=self._settings.max_retries,
            exhausted=exhausted,
        )

    def fail(self, claim: Claim, error: PissaError, *, discard: bool) -> None:
        """Fail the job; with `discard` what is staged goes, being of no further use."""
        self._write(
            "fail", claim, error=json.dumps(error.as_dict()), discard="all" if discard else "none"
        )

    def _write(self, operation: str, claim: Claim, **fields: Any) -> Stop | None:
        answer = self.connection.call(
            operation,
            id=claim.job_id,
            task=claim.task,
            token=claim.token,
            worker=claim.worker,
            **fields,
        )
        if answer.get("lost"):
            raise LeaseLost(f"{claim.job_id} {claim.task}")
        stop = answer.get("stop")
        return None if stop is None else Stop(stop)


def _never_left_alone(restarts: int) -> AttemptsExhausted:
    return AttemptsExhausted(
        f"what the job had staged was discarded under it, and it was begun anew {restarts} times, "
        "as often as allowed",
        hint="another job with the same source, config and output is being cancelled or deleted; "
        "resume this one when that is over",
    )


def is_restart(error: PissaError) -> bool:
    """Whether the job must be planned anew: what the plan, or sealed work, rests on has changed."""
    return error.code == "source_changed" or isinstance(error, Cancelled)
