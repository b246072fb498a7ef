"""The way of the data, on one page: plan → shards → report → publish.

The only file that knows the order of things. It yields what happens; whoever iterates turns
that into a progress bar, a log line or the state of a job. To stop, stop iterating and close.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import cast

from pissa_core.adapters.disk import disk_errors
from pissa_core.admission import check_plan, is_elsewhere, traffic_of
from pissa_core.assembly import publication
from pissa_core.budgets import publish_bytes, sizes_of
from pissa_core.decompose import decompose
from pissa_core.errors import (
    CheckpointError,
    OutputError,
    OutputExists,
    PissaError,
    SourceChanged,
    TargetError,
    WayBackError,
)
from pissa_core.events import (
    Event,
    MatrixDone,
    Planned,
    Published,
    Publishing,
    ShardSealed,
    ShardStarted,
    Waiting,
)
from pissa_core.fold.result import folded_publication
from pissa_core.fold.work import Beside, Folding
from pissa_core.headstart import HeadStart
from pissa_core.lanes import in_turn, side_by_side
from pissa_core.plan import IN_FLIGHT, Plan
from pissa_core.planning import make_plan
from pissa_core.ports import CheckpointSink, CheckpointSource, Seal
from pissa_core.runtime import Runtime, computing
from pissa_core.spec import PissaConfig, parse_config
from pissa_core.traffic import ThreadGate, Traffic
from pissa_core.workbench import open_workbench, scratch_bytes, stays_as_it_is


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
    plan = check_plan(plan, source, sink, runtime, beside=beside)
    yield Planned(plan)
    try:
        if sink.published() is None:
            yield from _run_shards(plan, source, sink, runtime, head_start, beside)
        yield from (e for e in publish(plan, source, sink, runtime) if not isinstance(e, Waiting))
    except PissaError as error:
        if is_hopeless(error):
            sink.discard()
        raise


def is_hopeless(error: PissaError) -> bool:
    """Whether trying again cannot help, so that staged work is of no further use.

    What lies where the result belongs can be moved away, and hours of work be shown after all. A
    request that is refused amid the work is refused by this machine: another may carry it out.
    """
    kinds = (CheckpointError, TargetError, OutputError, WayBackError)
    return isinstance(error, kinds) and not isinstance(error, OutputExists)


def run_shard(
    plan: Plan,
    shard: str,
    source: CheckpointSource,
    sink: CheckpointSink,
    runtime: Runtime,
    head_start: HeadStart | None = None,
    *,
    beside: Beside | None = None,
) -> Generator[Waiting | ShardStarted | MatrixDone | ShardSealed]:
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
    shared = traffic_of(runtime, sink)
    with sink.attempt(shard) as attempt, disk_errors(attempt.folder), shared.passage(shard) as way:
        yield from way.to_disk(scratch_bytes(plan, work), attempt.folder)
        yield from way.to_line()
        folding = _folding(plan, beside)
        replace = None if folding is None else partial(folding.replace, source, work)
        uploaded = is_elsewhere(sink)
        with open_workbench(
            attempt.folder, plan, work, source, replace=replace, read_again=uploaded
        ) as bench:
            yield ShardStarted(shard, count, len(bench.rows))
            rows = dict(bench.rows)
            for matrix in work.matrices:
                if matrix.tensor in rows:
                    nbytes = matrix.stop - matrix.start
                    yield MatrixDone(shard, rows[matrix.tensor], nbytes, 0.0, resumed=True)
            missing = [matrix for matrix in work.matrices if matrix.tensor not in rows]
            yield from way.to_device() if missing else ()
            way.fetched()
            with computing(runtime) as resolved:  # what is free is known once nobody else computes
                if folding is None:
                    config = parse_config(plan.config)
                    doing = decompose(missing, config, bench, resolved, head_start)
                else:
                    doing = folding.matrices(missing, bench, resolved)
                with closing(doing):  # what is in flight is waited for before others compute
                    for done in doing:
                        rows[done.row["tensor"]] = done.row
                        yield done
            way.computed()
            ordered = tuple(rows[matrix.tensor] for matrix in work.matrices)
            seal = bench.close_shard(ordered, attempt.folder)
        attempt.seal(seal, attempt.folder / "shard", attempt.folder / "part")
    yield ShardSealed(shard, work.size, count)


def _run_shards(
    plan: Plan,
    source: CheckpointSource,
    sink: CheckpointSink,
    runtime: Runtime,
    head_start: HeadStart | None,
    beside: Beside | None,
) -> Iterator[MatrixDone | ShardStarted | ShardSealed]:
    """Convert all shards, up to `IN_FLIGHT` of them side by side."""
    lanes = min(IN_FLIGHT, len(plan.shards))
    if lanes > 1 and runtime.traffic is None:
        runtime = dataclasses.replace(runtime, traffic=Traffic(ThreadGate(), ThreadGate()))
    streams = [
        partial(run_shard, plan, shard.path, source, sink, runtime, head_start, beside=beside)
        for shard in plan.shards
    ]
    events = side_by_side(streams, lanes=lanes) if lanes > 1 else in_turn(streams)
    with closing(cast("Generator[Event]", events)):
        for event in events:
            if not isinstance(event, Waiting):
                yield event


def publish(
    plan: Plan, source: CheckpointSource, sink: CheckpointSink, runtime: Runtime
) -> Iterator[Publishing | Waiting | Published]:
    """Write what is not shards, then make everything visible at once.

    Staged work goes when the iterator is asked for more after `Published`: by then the caller
    has recorded the success.
    """
    yield Publishing()
    if sink.published() is None:
        seals = _seals_of(sink, [shard.path for shard in plan.shards])
        contents = folded_publication if plan.fold else publication
        with traffic_of(runtime, sink).passage("") as way:
            if is_elsewhere(sink):
                needed = publish_bytes(plan, sizes_of(source), plan.estimate.adapter)
                yield from way.to_disk(needed, sink.publishing_folder)
            sink.publish(contents(plan, source, sink, seals))
    yield Published(sink.ref, json.loads(sink.published() or b"{}"))
    sink.discard()


def _folding(plan: Plan, beside: Beside | None) -> Folding | None:
    if plan.fold is None:
        return None
    if beside is None:
        raise ValueError("a fold reads an adapter beside the residual")
    return Folding(plan, plan.fold, beside)


def _seals_of(sink: CheckpointSink, shards: Sequence[str]) -> tuple[Seal, ...]:
    found = sink.seals_of(shards)
    for shard, seal in zip(shards, found, strict=True):
        if seal is None:
            raise SourceChanged(
                f"{shard} was finished, but its files no longer have their checksums",
                hint="run again: the shard will be converted anew",
            )
    return tuple(seal for seal in found if seal is not None)
