"""Whether a plan can end well here: its refusals, the output, disk and memory, before any work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pissa_core.adapters.ledger import Ledger
from pissa_core.budgets import check_disk_budget, check_memory_budget, sizes_of
from pissa_core.errors import DiskTooSmall, NoWriteAccess, error_from
from pissa_core.fold.planning import fold_bytes
from pissa_core.fold.result import folded_metadata
from pissa_core.fold.work import Beside
from pissa_core.layout.sidefiles import read_card
from pissa_core.plan import Matrix, Plan
from pissa_core.planning import bytes_in_flight
from pissa_core.ports import CheckpointSink, CheckpointSource
from pissa_core.report.card import metadata_of
from pissa_core.report.metadata import FIELDS, refused_fields, split_card
from pissa_core.runtime import Runtime, resolve
from pissa_core.traffic import Traffic


def check_plan(
    plan: Plan,
    source: CheckpointSource,
    sink: CheckpointSink,
    runtime: Runtime,
    *,
    beside: Beside | None = None,
) -> Plan:
    """Refuse, before any weight is read, what cannot end well.

    Returns the plan, without what of the source's card the output would refuse: hours of work must
    not end at a tag.

    Raises:
        PissaError: the first of the plan's refusals, an output that cannot take the result, or
            a disk or memory budget that is too small for it.
    """
    if plan.refused:
        first = plan.refused[0]
        others = len(plan.refused) - 1
        more = f" ({others} more refused; `pissa plan` lists all of them)" if others else ""
        raise error_from(first.code, f"{first.name}: {first.reason}{more}")
    for read in (source,) if beside is None else (source, beside.adapter):
        sink.check(read)
    _check_disk(plan, sink)
    _check_scratch(plan, source, sink, runtime)
    resolved = resolve(runtime)
    if runtime.memory_budget is not None:
        check_memory_budget(plan, resolved.budget, _needs(plan, resolved.device.type))
    return _with_valid_card(plan, source, sink)


def check_budgets(
    plan: Plan,
    source: CheckpointSource,
    *,
    disk_budget: int | None = None,
    memory_budget: int | None = None,
    scratch: Path | None = None,
) -> None:
    """Refuse a plan that was only asked for as `check_plan` would for want of disk or memory.

    Args:
        plan: of any kind; what it refuses itself is to be mended first, and nothing is asked then.
        source: the checkpoint.
        disk_budget: bytes of scratch; None: no limit, or what is free where `scratch` lies.
        memory_budget: bytes that matrices in flight may take together; None: no limit.
        scratch: where work in progress lies, if the result goes elsewhere.

    Raises:
        DiskTooSmall, MemoryTooSmall: a budget cannot hold what stands alone in it.
    """
    if plan.refused:
        return
    if scratch is not None:
        disk_budget = Ledger(scratch, disk_budget).capacity()
    if disk_budget is not None:
        check_disk_budget(plan, disk_budget, sizes=None if scratch is None else sizes_of(source))
    if memory_budget is not None:
        check_memory_budget(plan, memory_budget, _needs(plan))


def _with_valid_card(plan: Plan, source: CheckpointSource, sink: CheckpointSink) -> Plan:
    found = split_card(read_card(source))[0]
    make = metadata_of if plan.fold is None else folded_metadata

    def complaint(without: tuple[str, ...]) -> str | None:
        block = make(dataclasses.replace(plan, card_without=without), found).to_yaml()
        return sink.complaint_about(f"---\n{block}\n---\n".encode(errors="replace").decode())

    without = refused_fields(lambda fields: complaint(fields) is None)
    if without == FIELDS and (reason := complaint(without)) is not None:
        raise NoWriteAccess(f"the Hub takes no model card of ours ({reason})")
    return dataclasses.replace(plan, card_without=tuple(f for f in without if f in found))


def traffic_of(runtime: Runtime, sink: CheckpointSink) -> Traffic:
    """Return what shards under way share, with a ledger where their disk is bounded.

    Without a budget a local output needs none: all of it was seen to fit its disk.
    """
    shared = runtime.traffic or Traffic()
    ledger = shared.ledger
    if ledger is None and sink.scratch_folder is not None:
        ledger = Ledger(sink.scratch_folder, runtime.disk_budget)
    bounded = runtime.disk_budget is not None or is_elsewhere(sink)
    return dataclasses.replace(shared, ledger=ledger if bounded else None)


def is_elsewhere(sink: CheckpointSink) -> bool:
    """Whether what is sealed leaves this machine, so that only scratch lies here."""
    return sink.free_bytes() is None


def _check_disk(plan: Plan, sink: CheckpointSink) -> None:
    free = sink.free_bytes()
    if free is not None and plan.estimate.peak_disk > free:
        raise DiskTooSmall(
            f"the output needs {plan.estimate.peak_disk:,} bytes of disk and {free:,} are free "
            f"where {sink.ref} would lie",
            hint="free some space, or choose an output on another disk",
        )


def _check_scratch(
    plan: Plan, source: CheckpointSource, sink: CheckpointSink, runtime: Runtime
) -> None:
    ledger = traffic_of(runtime, sink).ledger
    if ledger is not None:
        sizes = sizes_of(source) if is_elsewhere(sink) else None
        check_disk_budget(plan, ledger.capacity(), sizes=sizes)


def _needs(plan: Plan, device: str = "cpu") -> Callable[[Matrix], int]:
    if plan.fold is None:
        return bytes_in_flight(plan, device)
    return partial(fold_bytes, plan, device=device)
