"""What the kinds of jobs share: telling the store what happens, publishing, sweeping."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

from pissa_core.errors import PissaError
from pissa_core.events import (
    MatrixDone,
    Published,
    Publishing,
    ShardSealed,
    ShardStarted,
    Waiting,
)
from pissa_core.ports import CheckpointSink
from worker.contract import WithOutput
from worker.holding import Hold
from worker.processes import peak_memory_bytes
from worker.store.tasks import Claim
from worker.wiring import Context

Step = Callable[[Context, Claim, Hold], None]
Figures = Callable[[Mapping[str, Any]], dict[str, Any]]
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kind:
    """The steps of one kind of job, in the order they come.

    Attributes:
        prepare: plans and refuses; ends with `TaskStore.planned`, which makes a task of each
            shard of the plan.
        shard: does one shard; ends with `TaskStore.shard_done`. The last one makes `publish`.
        publish: makes the result visible; `TaskStore.published`, then `TaskStore.finish`.
        discard: throws away what an ending job has staged.
    """

    prepare: Step
    shard: Step
    publish: Step
    discard: Step


def tell_shard(
    context: Context, claim: Claim, hold: Hold, events: Iterator[object], sink: CheckpointSink
) -> None:
    """Do a shard by asking for its events, and tell each; leave between two when asked to."""
    with closing(cast(Generator[object, None, None], events)):
        for event in events:
            _tell(context, claim, hold, event, sink)


def tell_publishing(
    context: Context,
    claim: Claim,
    hold: Hold,
    events: Iterator[Publishing | Waiting | Published],
    figures: Figures,
) -> None:
    """Publish by asking for the events, record the result, then let the iterator sweep.

    Args:
        context: this process's.
        claim: of the publish task.
        hold: on it.
        events: end with `Published`, after which asking on removes what was staged.
        figures: picks the result's figures out of the manifest.
    """
    with closing(cast(Generator[object, None, None], events)):
        for event in events:
            if isinstance(event, Publishing):
                hold.check(context.tasks.publishing(claim))
            elif isinstance(event, Waiting):
                hold.check()
            elif isinstance(event, Published):
                result = result_of(context, claim, event, figures)
                context.tasks.published(
                    claim, result=result, manifest=event.manifest, peak=peak_memory_bytes()
                )
                break
        sweep(context, claim, lambda: list(events))


def result_of(context: Context, claim: Claim, event: Published, figures: Figures) -> dict[str, Any]:
    """Return the job's result, but for the times, which the store knows."""
    kept = context.request_of(claim, WithOutput).output is None
    return {
        "output": None if kept else event.ref,
        "manifest": f"/v1/jobs/{claim.job_id}/manifest",
        **figures(event.manifest),
    }


def discard_staged(context: Context, claim: Claim, hold: Hold) -> None:
    """Throw away what an ending job has staged in its sink."""
    sink = context.sink(claim)
    keep = claim.discard != "all"
    traffic = context.runtime.traffic

    def work() -> None:
        sink.discard(keep_sealed=keep)
        if traffic is not None and traffic.ledger is not None:
            traffic.ledger.sweep()

    sweep(context, claim, work)


def sweep(context: Context, claim: Claim, work: Callable[[], object]) -> None:
    """Remove staged work and end the job; what cannot be removed does not keep it from ending."""
    try:
        work()
    except (PissaError, OSError):
        logger.exception("not everything that was staged could be removed")
    context.tasks.finish(claim)


def _tell(context: Context, claim: Claim, hold: Hold, event: object, sink: CheckpointSink) -> None:
    tasks = context.tasks
    if isinstance(event, Waiting):
        hold.check()
    elif isinstance(event, ShardStarted):
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
