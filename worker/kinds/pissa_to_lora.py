"""`pissa-to-lora`: one shard, the converted adapter's file of weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from pissa_core.adapters import request_digest
from pissa_core.errors import SourceChanged
from worker.contract import PissaToLora
from worker.holding import Hold
from worker.kinds.telling import Kind, discard_staged, sweep, tell_publishing, tell_shard
from worker.store.tasks import Claim
from worker.wiring import Context, placed_ref

if TYPE_CHECKING:
    from pissa_core.lora.plan import LoraPlan
    from pissa_core.ports import CheckpointSource


def _prepare(context: Context, claim: Claim, hold: Hold) -> None:
    from pissa_core.fold.adapter import adapter_size
    from pissa_core.lora.planning import check_lora_plan, make_lora_plan, open_adapters

    request, root = context.request_of(claim, PissaToLora), context.settings.local_root
    open_ref = partial(context.source, claim)
    initial = None if request.initial is None else placed_ref(request.initial, root)
    found = open_adapters(placed_ref(request.trained, root), initial, open_ref, root=root)
    digest = _digest(context, claim, found.trained, found.initial)
    for adapter in (found.trained, found.initial):
        context.check_size(adapter.ref, adapter_size(adapter))
    plan = make_lora_plan(found, request.lora, open_ref, slots=context.runtime.slots, root=root)
    for update in plan.updates:
        context.check_ranks(plan.source, (update.trained.rank, update.initial.rank))
    check_lora_plan(plan, found, context.sink(claim, digest), context.runtime)
    hold.check()
    context.tasks.planned(claim, plan, digest)


def _shard(context: Context, claim: Claim, hold: Hold) -> None:
    from pissa_core.lora.conversion import make_weights

    plan, trained, initial = _planned(context, claim)
    sink = context.sink(claim)
    events = make_weights(plan, trained, initial, sink, context.runtime)
    tell_shard(context, claim, hold, events, sink)


def _publish(context: Context, claim: Claim, hold: Hold) -> None:
    from pissa_core.lora import conversion

    sink = context.sink(claim)
    if claim.published:
        sweep(context, claim, sink.discard)
        return
    plan, trained, _ = _planned(context, claim)
    tell_publishing(context, claim, hold, conversion.publish(plan, trained, sink), _figures)


def _planned(context: Context, claim: Claim) -> tuple[LoraPlan, CheckpointSource, CheckpointSource]:
    """Open the adapters that were planned.

    Raises:
        SourceChanged: if one is no longer in the state that the plan was made from.
    """
    from pissa_core.lora.plan import LoraPlan

    plan = LoraPlan.from_json(context.tasks.plan_text(claim.job_id))
    trained, initial = context.source(claim, plan.source), context.source(claim, plan.initial)
    if _digest(context, claim, trained, initial) != claim.digest:
        raise SourceChanged(
            f"the files of {plan.source} or {plan.initial} have changed since the job was planned",
            hint="it is planned again from what is there now",
        )
    return plan, trained, initial


def _digest(
    context: Context, claim: Claim, trained: CheckpointSource, initial: CheckpointSource
) -> str:
    options = context.request_of(claim, PissaToLora).lora.model_dump(mode="json")
    output = context.output_name(claim)
    return request_digest("pissa-to-lora", [trained, initial], options, output)


def _figures(manifest: Mapping[str, Any]) -> dict[str, Any]:
    totals = manifest["totals"]
    return {
        "matrices": totals["matrices"],
        "energy": None,
        "max_missed": None,
        "max_recombination_error": None,
        "max_lost": totals["max_lost"],
        "ranks": [totals["smallest_rank"], totals["largest_rank"]],
        "notes": manifest["lineage"]["notes"],
        "passed": None,
    }


KIND = Kind(_prepare, _shard, _publish, discard_staged)
