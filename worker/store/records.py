"""From the hash of a job to the job as every answer shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from worker.contract import Count, Job, JobError, JobEvent, JobWait, Progress
from worker.terms import EventType, Phase, Status, is_telling


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker that has been heard of lately; `seen_s` is how long ago."""

    name: str
    device: str
    busy: bool
    seen_s: float
    queues: tuple[str, ...] = ()


def as_job(job_id: str, fields: Mapping[str, str], now_ms: int) -> Job:
    """Read a job's hash."""
    error = fields.get("error")
    status, phase = Status(fields["status"]), Phase(fields["phase"])
    progress = Progress(
        matrices=_count(fields, "matrices"),
        shards=_count(fields, "shards"),
        bytes=_count(fields, "bytes"),
    )
    shown_error = error is not None and status in (Status.FAILED, Status.CANCELLED)
    return Job(
        id=job_id,
        kind=fields["kind"],
        status=status,
        phase=phase,
        waiting=_wait(fields) if phase is Phase.WAITING else None,
        staged="digest" in fields,
        progress=progress,
        eta_s=_eta(fields, status, progress.bytes, now_ms),
        created_at=_time(fields["created"]),
        started_at=_time(fields["started"]) if "started" in fields else None,
        finished_at=_time(fields["finished"]) if "finished" in fields else None,
        attempts=int(fields["attempts"]),
        request=json.loads(fields["request"]),
        result=_result(fields) if status is Status.SUCCEEDED else None,
        error=JobError(**json.loads(error)) if error and shown_error else None,
    )


def as_event(event_id: str, fields: Mapping[str, str]) -> JobEvent:
    """Read one entry of a job's stream; its id begins with the time in milliseconds."""
    data = json.loads(fields["data"]) or {}
    at = _time(event_id.partition("-")[0])
    return JobEvent(id=event_id, at=at, type=EventType(fields["type"]), data=data)


def _wait(fields: Mapping[str, str]) -> JobWait | None:
    text = fields.get("waiting")
    return JobWait.model_validate_json(text) if text else None


def _count(fields: Mapping[str, str], what: str) -> Count:
    return Count(done=int(fields.get(f"{what}_done", 0)), total=int(fields.get(f"{what}_total", 0)))


def _eta(fields: Mapping[str, str], status: Status, work: Count, now_ms: int) -> float | None:
    """Estimate from the pace since the shards began, at which resumed work has no part.

    None until there is a pace to go by: the first matrices carry the start of a process and the
    first reads of a cold disk, and what they promise is often off by ten.
    """
    fresh = work.done - int(fields.get("bytes_resumed", 0))
    if status is not Status.RUNNING or fresh <= 0 or "shards_at" not in fields:
        return None
    elapsed_s = max(now_ms - int(fields["shards_at"]), 1) / 1000
    left = max(work.total - work.done, 0)
    if not is_telling(fresh, left, elapsed_s):
        return None
    return round(left * elapsed_s / fresh, 1)


def _result(fields: Mapping[str, str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(fields.get("result", "{}"))
    spent = {
        name.removeprefix("ms:"): int(value) / 1000
        for name, value in fields.items()
        if name.startswith("ms:")
    }
    return {
        **result,
        "seconds": (int(fields["finished"]) - int(fields["started"])) / 1000,
        "phase_seconds": spent,
        "peak_memory_bytes": int(fields["peak"]) if "peak" in fields else None,
    }


def _time(milliseconds: str) -> datetime:
    return datetime.fromtimestamp(int(milliseconds) / 1000, UTC)
