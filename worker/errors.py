"""Errors that the job store raises, beside those of `pissa_core.errors`; each has its code.

::

    PissaError
    └── StoreError
        ├── JobNotFound          not_found
        ├── Conflict             conflict
        ├── IdempotencyMismatch  idempotency_mismatch
        ├── QueueFull            too_many_requests
        ├── PlanTimeout          plan_timeout
        └── StoreUnavailable     store_unavailable
"""

from __future__ import annotations

from pissa_core.errors import PissaError, error_from

__all__ = [
    "Conflict",
    "IdempotencyMismatch",
    "JobNotFound",
    "PlanTimeout",
    "QueueFull",
    "StoreError",
    "StoreUnavailable",
    "error_from",
]


class StoreError(PissaError):
    """Something about a job's record rather than its work."""


class JobNotFound(StoreError):
    """There is no such job, or it belongs to somebody else."""

    code = "not_found"


class Conflict(StoreError):
    """The job's state does not allow what was asked."""

    code = "conflict"


class IdempotencyMismatch(StoreError):
    """The idempotency key was used before, with another body."""

    code = "idempotency_mismatch"


class QueueFull(StoreError):
    """The owner has as many jobs waiting as one may have."""

    code = "too_many_requests"


class PlanTimeout(StoreError):
    """The plan was not made in time; it may still be."""

    code = "plan_timeout"


class StoreUnavailable(StoreError):
    """The store does not answer."""

    code = "store_unavailable"
