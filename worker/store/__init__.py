"""Jobs in Valkey: the one truth about what was asked, what runs and how it ended.

`JobStore` is what the API uses, `TaskStore` what workers use, `Reaper` what goes round and
mends. Every change is one Lua script (`lua/`), so it happens whole or not at all. Nothing here
imports torch or Celery.
"""

from __future__ import annotations

from worker.store.jobs import JobStore
from worker.store.reaper import Reaper
from worker.store.records import WorkerInfo
from worker.store.tasks import Claim, LeaseLost, Stop, TaskStore

__all__ = ["Claim", "JobStore", "LeaseLost", "Reaper", "Stop", "TaskStore", "WorkerInfo"]
