"""The way of a trained adapter: plan → one file, update by update → card and manifest → publish."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from pissa_core.adapters.disk import disk_errors, file_info, write_stream
from pissa_core.adapters.local import LocalSource
from pissa_core.admission import traffic_of
from pissa_core.errors import SourceChanged
from pissa_core.events import MatrixDone, Published, Publishing, ShardSealed, ShardStarted, Waiting
from pissa_core.lora.adapter import WEIGHTS
from pissa_core.lora.assembly import publication
from pissa_core.lora.form import Form, form_of
from pissa_core.lora.layout import bound_entries, scratch_bytes, shrink
from pissa_core.lora.plan import LoraPlan, Update
from pissa_core.lora.updates import Converted, convert_update, read_factors, working_bytes
from pissa_core.ports import Attempt, CheckpointSink, CheckpointSource, Seal
from pissa_core.runtime import Resolved, Runtime, compute, computing
from pissa_core.shortage import named
from pissa_core.tensorfile import Header, PatchFile, make_header, memory_of


@dataclass(frozen=True, slots=True)
class _Bench:
    """What the work on one update needs."""

    plan: LoraPlan
    form: Form
    trained: CheckpointSource
    initial: CheckpointSource
    header: Header
    file: PatchFile
    resolved: Resolved


def convert_adapter(
    plan: LoraPlan,
    trained: CheckpointSource,
    initial: CheckpointSource,
    sink: CheckpointSink,
    runtime: Runtime,
) -> Iterator[ShardStarted | MatrixDone | ShardSealed | Publishing | Published]:
    """Convert a trained adapter from its plan to what is visible, in this process.

    Raises:
        PissaError: whatever `make_weights` and `publish` raise.
    """
    if sink.published() is None:
        with closing(make_weights(plan, trained, initial, sink, runtime)) as making:
            yield from (event for event in making if not isinstance(event, Waiting))
    yield from publish(plan, trained, sink)


def make_weights(
    plan: LoraPlan,
    trained: CheckpointSource,
    initial: CheckpointSource,
    sink: CheckpointSink,
    runtime: Runtime,
) -> Generator[Waiting | ShardStarted | MatrixDone | ShardSealed]:
    """Make the result's file of weights, update by update, and seal it; nothing if it is sealed."""
    work = plan.shards[0]
    if sink.seal_of(WEIGHTS) is not None:
        yield ShardSealed(WEIGHTS, work.size, len(plan.updates), resumed=True)
        return
    shared = traffic_of(runtime, sink)
    with (
        sink.attempt(WEIGHTS) as attempt,
        disk_errors(attempt.folder),
        shared.passage(WEIGHTS) as way,
    ):
        yield from way.to_disk(scratch_bytes(plan, (trained, initial)), attempt.folder)
        yield from way.to_line()
        yield ShardStarted(WEIGHTS, len(plan.updates), 0)
        near = _near(trained, attempt, "trained"), _near(initial, attempt, "initial")
        yield from way.to_device()
        header = make_header(bound_entries(plan))
        laid_out = attempt.folder / "laid-out"
        rows: dict[str, dict[str, Any]] = {}
        with PatchFile(laid_out, create_size=header.file_size) as file:
            with computing(runtime) as resolved:
                bench = _Bench(plan, form_of(plan), *near, header, file, resolved)
                file.write(0, header.encoded)
                _carry(bench)
                with closing(_convert_all(bench)) as converted:
                    for done in converted:
                        rows[done.row["module"]] = dict(done.row)
                        yield done
            way.computed()
            final = _finish(plan, file, header, rows, attempt.folder)
        shard = attempt.folder / "shard"
        if not final:
            laid_out.rename(shard)
        attempt.seal(_seal(plan, rows, attempt.folder), shard, attempt.folder / "part")
    yield ShardSealed(WEIGHTS, work.size, len(plan.updates))


def publish(
    plan: LoraPlan, trained: CheckpointSource, sink: CheckpointSink
) -> Iterator[Publishing | Published]:
    """Write config, card and manifest, and make everything visible at once.

    What was staged goes when the iterator is asked for more after `Published`.
    """
    yield Publishing()
    if sink.published() is None:
        seal = sink.seal_of(WEIGHTS)
        if seal is None:
            raise SourceChanged(
                f"{WEIGHTS} was finished, but it no longer has its checksum",
                hint="run again: it will be made anew",
            )
        sink.publish(publication(plan, trained, seal))
    yield Published(sink.ref, json.loads(sink.published() or b"{}"))
    sink.discard()


def _near(source: CheckpointSource, attempt: Attempt, name: str) -> CheckpointSource:
    """Return a source whose ranges are cheap to read: a download of the weights, if it is not."""
    if source.rereads:
        return source
    folder = attempt.folder / name
    folder.mkdir(exist_ok=True)
    source.fetch(WEIGHTS, folder / WEIGHTS)
    return LocalSource(folder)


def _carry(bench: _Bench) -> None:
    for tensor in bench.plan.carried:
        position = bench.header.starts[tensor.name]
        for piece in bench.trained.stream(WEIGHTS, tensor.start, tensor.stop):
            bench.file.write(position, piece)
            position += len(piece)


def _convert_all(bench: _Bench) -> Generator[MatrixDone]:
    options, resolved = bench.plan.options, bench.resolved
    sized = [(update, working_bytes(update, options)) for update in bench.plan.updates]
    name = attrgetter("module")
    yield from compute(resolved, partial(_convert_one, bench), sized, name=name)


def _convert_one(bench: _Bench, update: Update, device: torch.device) -> MatrixDone:
    began = time.perf_counter()
    with named(update.module, device, partial(working_bytes, update, bench.plan.options)):
        done = _converted(bench, update, device)
    _write(update, done, bench)
    return MatrixDone(WEIGHTS, done.row, update.nbytes, time.perf_counter() - began)


def _converted(bench: _Bench, update: Update, device: torch.device) -> Converted:
    return convert_update(
        update,
        read_factors(bench.trained, update.trained),
        read_factors(bench.initial, update.initial),
        form=bench.form,
        width=bench.form.width(bench.plan, update),
        options=bench.plan.options,
        device=device,
    )


def _write(update: Update, done: Converted, bench: _Bench) -> None:
    starts, factors = bench.header.starts, done.factors
    bench.file.write(starts[update.trained.a.name], memory_of(factors.A))
    bench.file.write(starts[update.trained.b.name], memory_of(factors.B))


def _finish(
    plan: LoraPlan, file: PatchFile, wide: Header, rows: dict[str, dict[str, Any]], folder: Path
) -> bool:
    """Make the file durable; say whether a smaller one, ``shard``, was made of it."""
    if plan.options.tolerance is None:
        file.sync()
        return False
    ranks = {module: row["rank"] for module, row in rows.items()}
    kept = max(ranks.values()) if plan.options.uniform else None
    write_stream(folder / "shard", shrink(plan, file, wide, ranks, kept))
    if kept is not None:
        for row in rows.values():
            row["rank"] = kept
    return True


def _seal(plan: LoraPlan, rows: Mapping[str, Mapping[str, Any]], folder: Path) -> Seal:
    # The contract wants a part beside the file; there are no factors to be assembled, so it is a
    # safetensors file that holds nothing.
    part = write_stream(folder / "part", [make_header(()).encoded])
    shard = file_info(folder / "shard")
    return Seal(
        shard=WEIGHTS,
        sha256=shard.sha256 or "",
        size=shard.size,
        part_sha256=part.sha256 or "",
        part_size=part.size,
        rows=tuple(rows[update.module] for update in plan.updates),
    )
