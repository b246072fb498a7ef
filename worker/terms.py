"""The words of jobs: states, phases, events, kinds. Importing this module loads nothing else."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """The state of a job; the last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether nothing of the job runs any more."""
        return self in (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)


class Phase(StrEnum):
    """What a job is at."""

    QUEUED = "queued"
    PLANNING = "planning"
    SHARDS = "shards"
    PUBLISHING = "publishing"
    WAITING = "waiting"
    DONE = "done"


class EventType(StrEnum):
    """The types of a job's events, in the order they usually come."""

    QUEUED = "queued"
    STARTED = "started"
    PLANNED = "planned"
    SHARD_STARTED = "shard_started"
    MATRIX_DONE = "matrix_done"
    SHARD_DONE = "shard_done"
    PUBLISHING = "publishing"
    WAITING = "waiting"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    RESUMED = "resumed"


class Task(StrEnum):
    """Celery task names; each takes one job id (and `SHARD` a shard's number), or a plan id."""

    PREPARE = "pissa.prepare"
    SHARD = "pissa.shard"
    PUBLISH = "pissa.publish"
    DISCARD = "pissa.discard"
    PLAN = "pissa.plan"


SOURCE_FIELDS = ("model", "initial", "trained", "residual", "adapter", "original", "converted")
"""The fields of a request, of any kind, that name what is read."""

MAIN_SOURCES = ("model", "trained", "residual", "original")
"""Of those the one that a job of each kind is about."""

LONGEST_PAGE = 200
"""The most jobs that one page of the list holds."""

KINDS = ("base-to-pissa", "pissa-to-lora", "pissa-to-base", "verify")
"""What a job can do; a request that does not say is for the first."""

_TELLING_S = 10.0
_TELLING_SHARE = 0.05


def is_telling(fresh: int, left: int, elapsed_s: float) -> bool:
    """Whether the pace of `fresh` bytes promises something of the bytes that are `left`."""
    return elapsed_s >= _TELLING_S or fresh >= _TELLING_SHARE * (fresh + left)
