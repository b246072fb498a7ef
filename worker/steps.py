"""What each task does: the engine's steps, told to the store as they happen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from typing import Any, cast

from pissa_core.adapters import staging_digest
from pissa_core.errors import PissaError
from pissa_core.events import MatrixDone, Published, Publishing, ShardSealed, ShardStarted
from pissa_core.ports import CheckpointSink
from worker.holding import Hold
from worker.processes import peak_memory_bytes
from worker.store.tasks import Claim, LeaseLost
from worker.wiring import Context

Step = Callable[[Context, Claim, Hold], None]
logger = logging.getLogger(__name__)


def prepare(context: Context, claim: Claim, hold: Hold) -> None:
    """Plan the job and refuse what cannot end well; the store makes a task of each shard."""
    from pissa_core.engine import check_plan
    from pissa_core.planning import make_plan
    from pissa_core.runtime import Runtime

    request = context.request_of(claim)
    source = context.source(claim, request.model)
    digest = staging_digest(source, request.pissa, context.output_name(claim))
    plan = make_plan(source, request.pissa, slots=context.runtime.slots)
    # The planner has no device of its own; what one offers is the compute node's to find out.
    check_plan(plan, source, context.sink(claim, digest), Runtime(device="cpu"))
    hold.check()
    context.tasks.planned(claim, plan, digest)


def shard(context: Context, claim: Claim, hold: Hold) -> None:
    """Convert one shard, telling every matrix; leave between two when asked to."""
    from pissa_core.engine import run_shard

    plan = context.tasks.plan_of(claim.job_id)
    path = plan.shards[int(claim.task.partition(":")[2])].path
    source, sink = context.planned_source(claim, plan), _sink(context, claim)
    events = run_shard(plan, path, source, sink, context.runtime)
    with closing(cast(Generator[object, None, None], events)):
        for event in events:
            _tell(context, claim, hold, event, sink)


def publish(context: Context, claim: Claim, hold: Hold) -> None:
    """Make the result visible, record it, then sweep what was staged."""
    from pissa_core import engine

    sink = _sink(context, claim)
    if claim.published:
        _sweep(context, claim, sink.discard)
        return
    plan = context.tasks.plan_of(claim.job_id)
    source = context.planned_source(claim, plan)
    events = engine.publish(plan, source, sink)
    with closing(cast(Generator[object, None, None], events)):
        for event in events:
            if isinstance(event, Publishing):
                hold.check(context.tasks.publishing(claim))
            elif isinstance(event, Published):
                result = result_of(context, claim, event)
                context.tasks.published(
                    claim, result=result, manifest=event.manifest, peak=peak_memory_bytes()
                )
                break
        _sweep(context, claim, lambda: list(events))


def discard(context: Context, claim: Claim, hold: Hold) -> None:
    """Throw away what an ending job has staged: its scratch, or all of it."""
    sink = _sink(context, claim)
    keep = claim.discard != "all"
    _sweep(context, claim, lambda: sink.discard(keep_sealed=keep))


def plan(context: Context, claim: Claim, hold: Hold) -> None:
    """Make a plan that somebody waits for."""
    from pissa_core.planning import make_plan

    request = context.request_of(claim)
    source = context.source(claim, request.model)
    made = make_plan(source, request.pissa, slots=context.runtime.slots)
    context.tasks.finish(claim, made.public())


STEPS: Mapping[str, Step] = {
    "prepare": prepare,
    "shard": shard,
    "publish": publish,
    "discard": discard,
    "plan": plan,
}


def result_of(context: Context, claim: Claim, event: Published) -> dict[str, Any]:
    """Return the job's result, but for the times, which the store knows."""
    totals = event.manifest["totals"]
    kept = context.request_of(claim).output is None
    return {
        "output": None if kept else event.ref,
        "manifest": f"/v1/jobs/{claim.job_id}/manifest",
        "matrices": totals["matrices"],
        "energy": totals["energy"],
        "max_missed": totals["max_missed"],
        "max_recombination_error": totals["max_recombination_error"],
        "passed": None,
    }


def _tell(context: Context, claim: Claim, hold: Hold, event: object, sink: CheckpointSink) -> None:
    tasks = context.tasks
    if isinstance(event, ShardStarted):
        hold.check(tasks.shard_started(claim, event.shard, event.matrices, event.resumed))
    elif isinstance(event, MatrixDone):
        answer = tasks.matrix_done(
            claim,
            event.row,
            nbytes=event.nbytes,
            seconds=event.seconds,
            resumed=event.resumed,
        )
        hold.check(answer)
    elif isinstance(event, ShardSealed):
        seal = sink.seal_of(event.shard) if event.resumed else None
        tasks.shard_done(
            claim,
            event.shard,
            nbytes=event.nbytes,
            matrices=event.matrices,
            resumed=event.resumed,
            peak=peak_memory_bytes(),
            rows={row["tensor"]: row for row in seal.rows} if seal else None,
        )


def _sweep(context: Context, claim: Claim, sweep: Callable[[], object]) -> None:
    """Remove staged work and end the job; what cannot be removed does not keep it from ending."""
    try:
        sweep()
    except (PissaError, OSError):
        logger.exception("%s: not everything that was staged could be removed", claim.job_id)
    context.tasks.finish(claim)


def _sink(context: Context, claim: Claim) -> CheckpointSink:
    if claim.digest is None:
        raise LeaseLost(claim.job_id)
    return context.sink(claim, claim.digest)
