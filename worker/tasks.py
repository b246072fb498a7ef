"""The Celery tasks: ids come in, `worker.runner` does the rest."""

from __future__ import annotations

from celery import shared_task, signals

from worker.node import log_as_node
from worker.terms import Task

# A child that was spawned, not forked, knows nothing of its parent but what it imports.
signals.setup_logging.connect(log_as_node, weak=False)


def prepare(job_id: str) -> None:
    """Plan a job."""
    _carry_out(job_id, "prepare")


def shard(job_id: str, index: int) -> None:
    """Convert one shard of a job."""
    _carry_out(job_id, f"shard:{index}")


def publish(job_id: str) -> None:
    """Make a job's result visible."""
    _carry_out(job_id, "publish")


def discard(job_id: str) -> None:
    """Throw away what an ending job has staged."""
    _carry_out(job_id, "discard")


def plan(plan_id: str) -> None:
    """Make a plan that somebody waits for."""
    _carry_out(plan_id, "plan")


def _carry_out(job_id: str, task: str) -> None:
    # Imported late: a node's parent process loads what its children need before it forks.
    from worker.bounds import bound_planning
    from worker.processes import choose_to_die_first
    from worker.runner import carry_out
    from worker.wiring import context

    choose_to_die_first()
    if task in ("prepare", "plan"):
        bound_planning()
    carry_out(context(), job_id, task)


for _task, _function in {
    Task.PREPARE: prepare,
    Task.SHARD: shard,
    Task.PUBLISH: publish,
    Task.DISCARD: discard,
    Task.PLAN: plan,
}.items():
    shared_task(name=_task.value)(_function)
