"""`base-to-pissa`: the engine's own steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pissa_core.adapters import staging_digest
from pissa_core.errors import SourceChanged
from pissa_core.plan import Plan
from worker.contract import BaseToPissa
from worker.holding import Hold
from worker.kinds.telling import Kind, discard_staged, sweep, tell_publishing, tell_shard
from worker.store.tasks import Claim
from worker.wiring import Context

if TYPE_CHECKING:
    from pissa_core.ports import CheckpointSource


def _prepare(context: Context, claim: Claim, hold: Hold) -> None:
    from pissa_core.admission import check_plan
    from pissa_core.planning import make_plan

    request = context.request_of(claim, BaseToPissa)
    source = context.source(claim, request.model)
    plan = make_plan(source, request.pissa, **context.limits(request))
    digest = staging_digest(source, request.pissa, context.output_name(claim), plan.division)
    context.check_plan_size(plan, source)
    # The planner has no device of its own; what one offers is the compute node's to find out.
    runtime = dataclasses.replace(context.runtime, device="cpu")
    plan = check_plan(plan, source, context.sink(claim, digest), runtime)
    hold.check()
    context.tasks.planned(claim, plan, digest)


def _shard(context: Context, claim: Claim, hold: Hold) -> None:
    from pissa_core.engine import run_shard

    plan = Plan.from_json(context.tasks.plan_text(claim.job_id))
    path = plan.shards[int(claim.task.partition(":")[2])].path
    source, sink = _planned_source(context, claim, plan), context.sink(claim)
    events = run_shard(plan, path, source, sink, context.runtime)
    tell_shard(context, claim, hold, events, sink)


def _publish(context: Context, claim: Claim, hold: Hold) -> None:
    from pissa_core import engine

    sink = context.sink(claim)
    if claim.published:
        sweep(context, claim, sink.discard)
        return
    plan = Plan.from_json(context.tasks.plan_text(claim.job_id))
    source = _planned_source(context, claim, plan)
    events = engine.publish(plan, source, sink, context.runtime)
    tell_publishing(context, claim, hold, events, _figures)


def _planned_source(context: Context, claim: Claim, plan: Plan) -> CheckpointSource:
    """Open the checkpoint that was planned.

    Raises:
        SourceChanged: if it is no longer in the state that the plan was made from.
    """
    source = context.source(claim, plan.source)
    request = context.request_of(claim, BaseToPissa)
    output = context.output_name(claim)
    if staging_digest(source, request.pissa, output, plan.division) != claim.digest:
        raise SourceChanged(
            f"the files of {plan.source} have changed since the job was planned",
            hint="it is planned again from what is there now",
        )
    return source


def _figures(manifest: Mapping[str, Any]) -> dict[str, Any]:
    names = ("matrices", "energy", "max_missed", "max_recombination_error")
    figures = {name: manifest["totals"][name] for name in names}
    return {**figures, "passed": None, "notes": manifest.get("notes", [])}


KIND = Kind(_prepare, _shard, _publish, discard_staged)
