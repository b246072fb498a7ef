"""`pissa-to-base`: the engine's own steps, with an adapter beside the residual."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from pissa_core.adapters import folding_digest
from pissa_core.errors import PissaError, SourceChanged
from pissa_core.plan import Plan
from worker.contract import PissaToBase
from worker.holding import Hold
from worker.kinds.telling import Kind, discard_staged, sweep, tell_publishing, tell_shard
from worker.store.tasks import Claim
from worker.wiring import Context

if TYPE_CHECKING:
    from pissa_core.fold.work import Beside
    from pissa_core.ports import CheckpointSource


def _prepare(context: Context, claim: Claim, hold: Hold) -> None:
    from pissa_core.admission import check_plan
    from pissa_core.fold.adapter import adapter_size
    from pissa_core.fold.planning import make_fold_plan
    from pissa_core.fold.work import Beside

    request = context.request_of(claim, PissaToBase)
    residual, adapter = (context.source(claim, ref) for ref in (request.residual, request.adapter))
    context.check_size(adapter.ref, adapter_size(adapter))
    open_other = partial(context.source, claim)
    plan = make_fold_plan(residual, adapter, open_other, **context.limits(request))
    context.check_plan_size(plan, residual)
    context.check_ranks(adapter.ref, (matrix.rank for matrix in plan.matrices))
    digest = _digest(context, claim, plan, residual, adapter)
    # The planner has no device of its own; what one offers is the compute node's to find out.
    runtime = dataclasses.replace(context.runtime, device="cpu")
    sink = context.sink(claim, digest)
    plan = check_plan(plan, residual, sink, runtime, beside=Beside(adapter, None))
    hold.check()
    context.tasks.planned(claim, plan, digest)


def _shard(context: Context, claim: Claim, hold: Hold) -> None:
    from pissa_core.engine import run_shard

    plan = Plan.from_json(context.tasks.plan_text(claim.job_id))
    path = plan.shards[int(claim.task.partition(":")[2])].path
    (residual, beside), sink = _planned(context, claim, plan), context.sink(claim)
    events = run_shard(plan, path, residual, sink, context.runtime, beside=beside)
    tell_shard(context, claim, hold, events, sink)


def _publish(context: Context, claim: Claim, hold: Hold) -> None:
    from pissa_core import engine

    sink = context.sink(claim)
    if claim.published:
        sweep(context, claim, sink.discard)
        return
    plan = Plan.from_json(context.tasks.plan_text(claim.job_id))
    residual, _ = _planned(context, claim, plan)
    events = engine.publish(plan, residual, sink, context.runtime)
    tell_publishing(context, claim, hold, events, _figures)


def _planned(context: Context, claim: Claim, plan: Plan) -> tuple[CheckpointSource, Beside]:
    """Open what was planned.

    Raises:
        SourceChanged: if it is no longer in the state that the plan was made from.
    """
    from pissa_core.fold.work import Beside

    assert plan.fold is not None
    residual, adapter = (context.source(claim, ref) for ref in (plan.source, plan.fold.adapter))
    if _digest(context, claim, plan, residual, adapter) != claim.digest:
        raise SourceChanged(
            f"the files of {plan.source} or {plan.fold.adapter} have changed since the job was "
            "planned",
            hint="it is planned again from what is there now",
        )
    return residual, Beside(adapter, _original(context, claim, plan.fold.original))


def _original(context: Context, claim: Claim, ref: str | None) -> CheckpointSource | None:
    try:
        return None if ref is None else context.source(claim, ref)
    except PissaError as error:
        raise SourceChanged(
            f"the original {ref} can no longer be read: {error.message}",
            hint="the job is planned again, without holding the result against it",
        ) from error


def _digest(
    context: Context,
    claim: Claim,
    plan: Plan,
    residual: CheckpointSource,
    adapter: CheckpointSource,
) -> str:
    output = context.output_name(claim)
    return folding_digest(residual, adapter, output, plan.division)


def _figures(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {**manifest["totals"], "passed": None}


KIND = Kind(_prepare, _shard, _publish, discard_staged)
"""The steps of a `pissa-to-base` job."""
