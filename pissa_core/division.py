"""Giant shards: a source shard that the disk budget cannot hold becomes several output shards.

Each holds a run of consecutive tensors, in the order of offsets, so it is one range of the source
file behind a header of its own: read by range requests, then patched like any other shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from pissa_core.adapters.ledger import Ledger, least_budget
from pissa_core.errors import DiskTooSmall
from pissa_core.layout import Layout, Shard, TensorInfo
from pissa_core.plan import IN_FLIGHT, CarriedTensor, Matrix, Plan, Run, ShardPlan
from pissa_core.tensorfile import Entry, make_header
from pissa_core.workbench import JOURNAL_BYTES, part_entries, row_bytes, scratch_bytes

MAX_SHARD_SIZE = 5_000_000_000
"""Bytes of an output shard made by dividing; what the Hub's own tools long wrote."""

_Placed = TypeVar("_Placed", Matrix, CarriedTensor)
_INDEX = "model.safetensors.index.json"
_ENTRY_BYTES = 256  # bounds a tensor's entry in a header, but for its name


@dataclass(frozen=True, slots=True)
class _Limits:
    file: int
    scratch: int


def fit_to_disk(
    plan: Plan,
    layout: Layout,
    *,
    disk_budget: int | None,
    max_shard_size: int,
    scratch: Path | None,
) -> tuple[Plan, int | None]:
    """Divide what the disk cannot hold; return the plan, and what scratch may take if only that
    lies here.

    Args:
        plan: of any kind, its shards whole.
        layout: of the checkpoint.
        disk_budget: bytes of scratch; None: no limit, or what is free where `scratch` lies.
        max_shard_size: bytes of the shards that a giant is divided into.
        scratch: where work in progress lies, if the result goes elsewhere (to the Hub).

    Raises:
        DiskTooSmall: as `divide` does.
    """
    if scratch is not None:
        disk_budget = Ledger(scratch, disk_budget).capacity()
    if disk_budget is not None:
        plan = divide(plan, layout, disk_budget=disk_budget, max_shard_size=max_shard_size)
    return plan, None if scratch is None else disk_budget


def divide(plan: Plan, layout: Layout, *, disk_budget: int, max_shard_size: int) -> Plan:
    """Divide the shards whose scratch alone would exceed the disk budget; the rest stay whole.

    All output shards are then named as transformers names them, and a new index is made. A run
    keeps within `max_shard_size` bytes and a share of the budget that lets `IN_FLIGHT` of them
    lie on the disk together; a tensor that is larger alone gets a shard of its own.

    Raises:
        DiskTooSmall: if config.json names the one file of weights, which must then stay one.
    """
    giants = {s.path for s in plan.shards if scratch_bytes(plan, s) > disk_budget}
    giants &= {shard.path for shard in layout.shards if len(shard.tensors) > 1}
    if not giants:
        return plan
    if layout.index is None and layout.config.get("transformers_weights"):
        raise DiskTooSmall(
            f"{plan.shards[0].path} has {plan.shards[0].size:,} bytes and the disk budget is "
            f"{disk_budget:,}; config.json names the file, so it cannot become several",
            hint=least_budget(max(scratch_bytes(plan, shard) for shard in plan.shards)),
        )
    limits = _Limits(max_shard_size, disk_budget // IN_FLIGHT - JOURNAL_BYTES)
    runs = [
        (shard, run)
        for shard in layout.shards
        for run in (_runs(plan, shard, limits) if shard.path in giants else [shard.tensors])
    ]
    names = [f"model-{i:05d}-of-{len(runs):05d}.safetensors" for i in range(1, len(runs) + 1)]
    renamed = {t.name: name for name, (_, run) in zip(names, runs, strict=True) for t in run}
    shards = tuple(
        _whole(plan, shard, name) if len(run) == len(shard.tensors) else _part(plan, run, name)
        for name, (shard, run) in zip(names, runs, strict=True)
    )
    placed = {shard.path: shard for shard in shards}

    def moved(tensors: tuple[CarriedTensor, ...]) -> tuple[CarriedTensor, ...]:
        return tuple(_moved(tensor, placed[renamed[tensor.tensor]]) for tensor in tensors)

    fold = plan.fold
    return replace(
        plan,
        shards=shards,
        carried=moved(plan.carried),
        fold=None if fold is None else replace(fold, replaced=moved(fold.replaced)),
        index=layout.index or _INDEX,
        new_index=_index(layout, renamed),
    )


def _runs(plan: Plan, shard: Shard, limits: _Limits) -> Iterator[tuple[TensorInfo, ...]]:
    """Cut a shard's tensors into runs, each as long as the limits allow."""
    parts = _part_bytes(plan, shard.path)
    run: list[TensorInfo] = []
    size = scratch = 0
    for tensor in shard.tensors:
        nbytes = tensor.nbytes + len(tensor.name.encode()) + _ENTRY_BYTES
        part = parts.get(tensor.name, 0)
        if run and (size + nbytes > limits.file or scratch + nbytes + part > limits.scratch):
            yield tuple(run)
            run, size, scratch = [], 0, 0
        run.append(tensor)
        size += nbytes
        scratch += nbytes + part
    yield tuple(run)


def _part_bytes(plan: Plan, path: str) -> Mapping[str, int]:
    """Say what each tensor of a shard adds to an attempt's scratch besides itself."""
    (shard,) = (shard for shard in plan.shards if shard.path == path)
    entries = {entry.name: entry.nbytes + 2 * _ENTRY_BYTES for entry in part_entries(plan, shard)}
    added = {t.tensor: entries[t.key] for t in plan.carried if t.shard == path}
    for matrix in shard.matrices:
        factors = (entries.get(key, 0) for key in (matrix.key_a, matrix.key_b))  # a fold has none
        added[matrix.tensor] = sum(factors) + row_bytes(matrix)
    return added


def _whole(plan: Plan, shard: Shard, name: str) -> ShardPlan:
    (planned,) = (planned for planned in plan.shards if planned.path == shard.path)
    whole = ShardPlan(name, planned.size, (), origin=shard.path)
    return replace(whole, matrices=tuple(_moved(m, whole) for m in planned.matrices))


def _part(plan: Plan, run: tuple[TensorInfo, ...], name: str) -> ShardPlan:
    header = make_header([Entry(t.name, t.dtype, t.shape, t.nbytes) for t in run])
    first, last, within = run[0], run[-1], {tensor.name for tensor in run}
    text = header.encoded[8:].decode()
    shard = ShardPlan(
        name, header.file_size, (), origin=first.shard, run=Run(first.start, last.stop, text)
    )
    matrices = (m for m in plan.matrices if m.shard == first.shard and m.tensor in within)
    return replace(shard, matrices=tuple(_moved(matrix, shard) for matrix in matrices))


def _moved(tensor: _Placed, shard: ShardPlan) -> _Placed:
    """Place a tensor of a source shard in the output shard that holds it."""
    shift = 0 if shard.run is None else shard.run.shift
    start, stop = tensor.start - shift, tensor.stop - shift
    return replace(tensor, shard=shard.path, start=start, stop=stop)


def _index(layout: Layout, weight_map: Mapping[str, str]) -> str:
    """Write the index as save_pretrained does."""
    total = sum(tensor.nbytes for tensor in layout.tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
