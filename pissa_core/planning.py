"""A checkpoint and a config become a plan: headers read, targets resolved, the cost estimated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pissa_core.budgets import publish_bytes, sizes_of
from pissa_core.division import MAX_SHARD_SIZE, fit_to_disk
from pissa_core.layout import Layout, read_layout
from pissa_core.layout.sidefiles import INITIAL
from pissa_core.plan import IN_FLIGHT, Estimate, Matrix, Plan, ShardPlan
from pissa_core.ports import CheckpointSource
from pissa_core.slots import usable_cores
from pissa_core.spec import PissaConfig
from pissa_core.split import working_bytes
from pissa_core.targets import resolve_targets
from pissa_core.tensorfile import TORCH_DTYPES, make_header
from pissa_core.workbench import part_entries, row_bytes, scratch_bytes

IMPORT_FOOTPRINT = 480_000_000
"""Bytes of a process that has imported torch, transformers and peft and made a plan.

Measured as the peak resident size on Linux with CPU builds (`tests/core/test_planning.py` holds
it to what it is there); a CUDA context adds its own.
"""
_UNKNOWN = Estimate(0, 0, 0, 0, 0)


def make_plan(
    source: CheckpointSource,
    config: PissaConfig,
    *,
    layout: Layout | None = None,
    slots: int | None = None,
    memory_budget: int | None = None,
    disk_budget: int | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    scratch: Path | None = None,
) -> Plan:
    """Decide what will happen to every tensor of `source`; reads headers and config.json only.

    What was asked for and cannot be converted correctly stands in `Plan.refused`.

    Args:
        source: the checkpoint.
        config: what to decompose and how.
        layout: that of the source, where its headers have been read.
        slots: matrices in flight, for the estimate of memory; None: one a core.
        memory_budget: bytes that matrices in flight may take together; None: no limit.
        disk_budget: bytes of scratch; a shard that needs more is divided. None: no limit.
        max_shard_size: bytes of the shards that such a one is divided into.
        scratch: where work in progress lies, if the result goes elsewhere (to the Hub); what is
            free there is the disk budget, if none is given.

    Raises:
        DiskTooSmall: as `division.divide` does.
        PissaError: the checkpoint's files are not what they should be, or nothing matched.
    """
    layout = layout or read_layout(source)
    targets = resolve_targets(layout, config)
    matrices = by_shard(targets.matrices)
    plan = Plan(
        source=source.ref,
        commit=source.commit,
        model_class=targets.model_class,
        names_from=targets.names_from,
        config=accepted_config(config),
        adapter_config=targets.adapter_config,
        shards=tuple(
            ShardPlan(shard.path, shard.size, matrices.get(shard.path, ()))
            for shard in layout.shards
        ),
        carried=targets.carried,
        index=layout.index,
        side_files=layout.side_files,
        left_out=layout.left_out,
        refused=targets.refused,
        notes=(*_about(layout), *targets.notes),
        estimate=_UNKNOWN,
    )
    plan, scratch_budget = fit_to_disk(
        plan, layout, disk_budget=disk_budget, max_shard_size=max_shard_size, scratch=scratch
    )
    sizes = sizes_of(source)
    cost = estimate(
        plan,
        sizes,
        slots=slots or usable_cores(),
        memory_budget=memory_budget,
        scratch_budget=scratch_budget,
    )
    return dataclasses.replace(plan, estimate=cost)


def _about(layout: Layout) -> Iterator[str]:
    if any(path.startswith(f"{INITIAL}/") for path in layout.left_out):
        yield (
            f"the model is itself a residual, as {INITIAL}/ in it says: the result is a residual "
            "of that, and neither the original's adapters nor the first residual's fit it"
        )


def accepted_config(config: PissaConfig) -> dict[str, Any]:
    """Return the config as JSON data with every default filled in; `parse_config` reads it."""
    return config.model_dump(mode="json")


def matrix_bytes(
    matrix: Matrix, method: str, rounding: str = "faithful", *, device: str = "cpu"
) -> int:
    """Return the bytes of memory, the device's own on a GPU, that one matrix needs in flight."""
    m, n, itemsize = matrix.out_features, matrix.in_features, TORCH_DTYPES[matrix.dtype].itemsize
    return working_bytes(m, n, matrix.rank, itemsize, method, rounding, device=device)


def bytes_in_flight(plan: Plan, device: str = "cpu") -> Callable[[Matrix], int]:
    """Return what tells the bytes of memory that a matrix of this conversion needs in flight."""
    method, rounding = plan.config["svd"]["method"], plan.config["rounding"]
    return partial(matrix_bytes, method=method, rounding=rounding, device=device)


def estimate(
    plan: Plan,
    sizes: Mapping[str, int],
    *,
    slots: int,
    memory_budget: int | None,
    scratch_budget: int | None = None,
) -> Estimate:
    """Foresee the cost of a plan from the sizes of its files.

    ``read`` and ``written`` count whole files, each once; ``adapter`` is exact. ``peak_disk`` adds
    to the output the factors a second time, in the parts they are assembled from, and the rows
    of journal, seals and manifest. Where the result goes elsewhere (`scratch_budget`: what may lie
    here meanwhile) it is that of the largest shards under way, or of publishing if that is more.
    ``peak_memory`` is the import footprint plus the `slots`
    largest matrices in flight, as far as the budget lets them fly together;
    ``peak_device_memory`` is the same of a GPU, without footprint, if one does the work.
    """
    index = sizes.get(plan.index or "", 0)
    along = sum(sizes[path] for path in plan.side_files)
    read = index + along + sum(shard.fetched for shard in plan.shards)
    written = index if plan.new_index is None else len(plan.new_index.encode())
    written += along + sum(shard.size for shard in plan.shards)
    adapter = adapter_bytes(plan)
    rows = sum(row_bytes(matrix) for matrix in plan.matrices)

    def in_flight(device: str) -> int:
        flights = sorted(map(bytes_in_flight(plan, device), plan.matrices), reverse=True)
        memory = sum(flights[:slots])
        if memory_budget is None:
            return memory
        # A matrix larger than the budget runs alone, so the largest is the least there can be.
        return max([min(memory, memory_budget), *flights[:1]])

    peak_disk = written + 2 * adapter + 3 * rows
    if scratch_budget is not None:
        peak_disk = scratch_peak(plan, sizes, adapter, scratch_budget)
    return Estimate(
        read=read,
        written=written + adapter,
        adapter=adapter,
        peak_memory=IMPORT_FOOTPRINT + in_flight("cpu"),
        peak_disk=peak_disk,
        peak_device_memory=in_flight("cuda"),
    )


def scratch_peak(plan: Plan, sizes: Mapping[str, int], adapter: int, budget: int) -> int:
    """Return the most that lies here at a time of a result that goes elsewhere."""
    needs = sorted((scratch_bytes(plan, shard) for shard in plan.shards), reverse=True)
    under_way = min(sum(needs[:IN_FLIGHT]), max(budget, *needs[:1]))
    return max(under_way, publish_bytes(plan, sizes, adapter))


def adapter_bytes(plan: Plan) -> int:
    """Return the size of the adapter's file, header and all."""
    entries = [entry for shard in plan.shards for entry in part_entries(plan, shard)]
    return make_header(entries).file_size


def by_shard(matrices: Iterable[Matrix]) -> Mapping[str, tuple[Matrix, ...]]:
    """Group matrices by their shard, in the order of their offsets."""
    grouped: dict[str, tuple[Matrix, ...]] = {}
    for matrix in sorted(matrices, key=lambda matrix: (matrix.shard, matrix.start)):
        grouped[matrix.shard] = (*grouped.get(matrix.shard, ()), matrix)
    return grouped
