"""The way of the data, on one page: plan → shards → report → publish.

The only file that knows the order of things. It yields what happens; whoever iterates turns
that into a progress bar, a log line or the state of a job. To stop, stop iterating and close.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial

from pissa_core.adapters.disk import disk_errors
from pissa_core.assembly import publication
from pissa_core.decompose import decompose
from pissa_core.errors import (
    CheckpointError,
    DiskTooSmall,
    MemoryTooSmall,
    OutputError,
    PissaError,
    Refused,
    SourceChanged,
    TargetError,
    WayBackError,
    error_from,
)
from pissa_core.events import (
    Event,
    MatrixDone,
    Planned,
    Published,
    Publishing,
    ShardSealed,
    ShardStarted,
)
from pissa_core.fold.planning import fold_bytes
from pissa_core.fold.result import folded_publication
from pissa_core.fold.work import Beside, Folding
from pissa_core.headstart import HeadStart
from pissa_core.plan import Plan, ShardPlan
from pissa_core.planning import make_plan, matrix_bytes
from pissa_core.ports import CheckpointSink, CheckpointSource, Seal
from pissa_core.runtime import Resolved, Runtime, resolve
from pissa_core.spec import PissaConfig, parse_config
from pissa_core.workbench import open_workbench, stays_as_it_is


def convert(
    source: CheckpointSource,
    sink: CheckpointSink,
    config: PissaConfig,
    runtime: Runtime,
    *,
    plan: Plan | None = None,
    head_start: HeadStart | None = None,
) -> Iterator[Event]:
    """Convert a checkpoint to its PiSSA form, from beginning to end in this process.

    Raises:
        PissaError: whatever `make_plan` and `carry_out` raise.
    """
    made = plan or make_plan(source, config)
    yield from carry_out(made, source, sink, runtime, head_start=head_start)


def carry_out(
    plan: Plan,
    source: CheckpointSource,
    sink: CheckpointSink,
    runtime: Runtime,
    *,
    head_start: HeadStart | None = None,
    beside: Beside | None = None,
) -> Iterator[Event]:
    """Do what a plan of any kind says; `beside` is what a fold reads besides the source.

    Closing the iterator, or being killed, leaves what is sealed and journalled: the same call
    goes on from there. An error that no further attempt can mend leaves nothing.

    Raises:
        PissaError: whatever `check_plan`, `run_shard` and `publish` raise.
    """
    check_plan(plan, source, sink, runtime, beside=beside)
    yield Planned(plan)
    try:
        if sink.published() is None:
            for shard in plan.shards:
                yield from run_shard(
                    plan, shard.path, source, sink, runtime, head_start, beside=beside
                )
        yield from publish(plan, source, sink)
    except PissaError as error:
        if is_hopeless(error):
            sink.discard()
        raise


def is_hopeless(error: PissaError) -> bool:
    """Whether trying again cannot help, so that staged work is of no further use."""
    kinds = (CheckpointError, TargetError, OutputError, WayBackError, Refused)
    return isinstance(error, kinds)


def check_plan(
    plan: Plan,
    source: CheckpointSource,
    sink: CheckpointSink,
    runtime: Runtime,
    *,
    beside: Beside | None = None,
) -> None:
    """Refuse, before any weight is read, what cannot end well.

    Raises:
        PissaError: the first of the plan's refusals, an output that cannot take the result, or
            a disk or memory budget that is too small for it.
    """
    if plan.refused:
        first = plan.refused[0]
        more = f" ({len(plan.refused) - 1} more are listed by the plan)" * (len(plan.refused) > 1)
        raise error_from(first.code, f"{first.name}: {first.reason}{more}")
    for read in (source,) if beside is None else (source, beside.adapter):
        sink.check(read)
    _check_disk(plan, sink)
    resolved = resolve(runtime)
    if runtime.memory_budget is not None:
        _check_memory(plan, resolved)


def run_shard(
    plan: Plan,
    shard: str,
    source: CheckpointSource,
    sink: CheckpointSink,
    runtime: Runtime,
    head_start: HeadStart | None = None,
    *,
    beside: Beside | None = None,
) -> Iterator[ShardStarted | MatrixDone | ShardSealed]:
    """Convert one shard: private copy, each matrix converted and patched in, both files sealed.

    A shard that is sealed already is not touched; matrices that a dead attempt finished are
    checked against its journal and not done again.
    """
    work = next(entry for entry in plan.shards if entry.path == shard)
    count = len(work.matrices)
    if sink.seal_of(shard) is not None:
        yield ShardSealed(shard, work.size, count, resumed=True)
        return
    if stays_as_it_is(plan, work) and sink.adopt(shard, source, work.source_path) is not None:
        yield ShardStarted(shard, count, 0)
        yield ShardSealed(shard, work.size, count)
        return
    with sink.attempt(shard) as attempt, disk_errors(attempt.folder):
        folding = _folding(plan, beside)
        replace = None if folding is None else partial(folding.replace, work)
        with open_workbench(attempt.folder, plan, work, source, replace=replace) as bench:
            yield ShardStarted(shard, count, len(bench.rows))
            rows = dict(bench.rows)
            for matrix in work.matrices:
                if matrix.tensor in rows:
                    nbytes = matrix.stop - matrix.start
                    yield MatrixDone(shard, rows[matrix.tensor], nbytes, 0.0, resumed=True)
            missing = [matrix for matrix in work.matrices if matrix.tensor not in rows]
            if folding is None:
                config = parse_config(plan.config)
                doing = decompose(missing, config, bench, resolve(runtime), head_start)
            else:
                doing = folding.matrices(missing, bench, resolve(runtime))
            for done in doing:
                rows[done.row["tensor"]] = done.row
                yield done
            ordered = tuple(rows[matrix.tensor] for matrix in work.matrices)
            seal = bench.close_shard(ordered, attempt.folder)
        attempt.seal(seal, attempt.folder / "shard", attempt.folder / "part")
    yield ShardSealed(shard, work.size, count)


def publish(
    plan: Plan, source: CheckpointSource, sink: CheckpointSink
) -> Iterator[Publishing | Published]:
    """Write what is not shards, then make everything visible at once.

    Staged work goes when the iterator is asked for more after `Published`: by then the caller
    has recorded the success.
    """
    yield Publishing()
    if sink.published() is None:
        seals = tuple(_seal_of(sink, shard) for shard in plan.shards)
        contents = folded_publication if plan.fold else publication
        sink.publish(contents(plan, source, sink, seals))
    yield Published(sink.ref, json.loads(sink.published() or b"{}"))
    sink.discard()


def _folding(plan: Plan, beside: Beside | None) -> Folding | None:
    if plan.fold is None:
        return None
    if beside is None:
        raise ValueError("a fold reads an adapter beside the residual")
    return Folding(plan, plan.fold, beside)


def _seal_of(sink: CheckpointSink, shard: ShardPlan) -> Seal:
    seal = sink.seal_of(shard.path)
    if seal is None:
        raise SourceChanged(
            f"{shard.path} was finished, but its files no longer have their checksums",
            hint="run again: the shard will be converted anew",
        )
    return seal


def _check_disk(plan: Plan, sink: CheckpointSink) -> None:
    free = sink.free_bytes()
    if free is not None and plan.estimate.peak_disk > free:
        raise DiskTooSmall(
            f"the output needs {plan.estimate.peak_disk:,} bytes of disk and {free:,} are free "
            f"where {sink.ref} would lie",
            hint="free some space, or choose an output on another disk",
        )


def _check_memory(plan: Plan, resolved: Resolved) -> None:
    needs = partial(fold_bytes, plan)
    if plan.fold is None:
        method, rounding = plan.config["svd"]["method"], plan.config["rounding"]
        needs = partial(matrix_bytes, method=method, rounding=rounding)
    largest = max(plan.matrices, key=needs)
    needed = needs(largest)
    if needed > resolved.budget:
        raise MemoryTooSmall(
            f"{largest.tensor} {list(largest.shape)} needs {needed:,} bytes in flight and the "
            f"memory budget is {resolved.budget:,}",
            hint="raise --memory-budget, or exclude the module",
        )
