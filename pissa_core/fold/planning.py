"""A residual and an adapter become a plan: what goes where, whether it may, what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pissa_core.budgets import sizes_of
from pissa_core.division import MAX_SHARD_SIZE, fit_to_disk
from pissa_core.errors import PissaError, error_from
from pissa_core.fold.adapter import Adapter, read_adapter
from pissa_core.fold.arithmetic import folding_bytes
from pissa_core.fold.belonging import Lineage, Open, check_is_listed, check_same_targets, trace
from pissa_core.layout import read_layout
from pissa_core.plan import CarriedTensor, Estimate, Fold, Matrix, Piece, Plan, ShardPlan
from pissa_core.planning import IMPORT_FOOTPRINT, by_shard, scratch_peak
from pissa_core.ports import CheckpointSource
from pissa_core.refs import LocalRef, parse_ref
from pissa_core.slots import usable_cores
from pissa_core.tensorfile import TORCH_DTYPES, memory_of

_ROW_BYTES = 1024
_UNKNOWN = Estimate(0, 0, 0, 0, 0)


def make_fold_plan(
    residual: CheckpointSource,
    adapter: CheckpointSource,
    open_other: Open,
    *,
    slots: int | None = None,
    memory_budget: int | None = None,
    disk_budget: int | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    scratch: Path | None = None,
) -> Plan:
    """Decide what an adapter does to every tensor of a residual model.

    Of both, headers and configs are read, and the adapter's checksum is taken.

    Args:
        residual: the model at the root of a base-to-pissa output.
        adapter: the initial adapter, or one trained from it.
        open_other: opens what the two name: the original, and the base the adapter was trained on.
        slots: matrices in flight, for the estimate of memory; None: one a core.
        memory_budget: bytes that matrices in flight may take together; None: no limit.
        disk_budget: bytes of scratch; a shard that needs more is divided. None: no limit.
        max_shard_size: bytes of the shards that such a one is divided into.
        scratch: where work in progress lies, if the result goes elsewhere; see `make_plan`.

    Raises:
        DiskTooSmall: as `division.divide` does.
        PissaError: a file is not what it should be, or the two do not belong together.
    """
    from pissa_core.targets.adapted import resolve_adapter

    layout = read_layout(residual)
    read = read_adapter(adapter)
    lineage = trace(residual, read, open_other)
    held = {key: tensor.shape for key, tensor in read.tensors.items()}
    adapted = resolve_adapter(layout, read.config, held)
    if adapted.refused:
        first = adapted.refused[0]
        raise error_from(first.code, f"{first.name}: {first.reason}")
    _check_dtypes(read)
    _check_twins(read, adapted.twins)
    if lineage.rows is not None:
        check_same_targets(adapted.matrices, lineage.rows)
    for shard in layout.shards:
        if residual.files()[shard.path].sha256 is not None:  # else when the shard's turn comes
            check_is_listed(residual, shard.path, lineage.listed)
    _check_copies(read, residual, adapted.copies)
    original = _find_original(lineage, adapted.matrices, open_other)
    matrices = by_shard(adapted.matrices)
    fold = Fold(
        adapter=adapter.ref,
        adapter_commit=adapter.commit,
        adapter_sha256=lineage.sha256,
        pieces=_pieces(read, adapted.matrices, adapted.replaced),
        replaced=adapted.replaced,
        initial=lineage.initial,
        original=original.ref,
        original_commit=original.commit,
        places=original.places,
        listed=lineage.listed,
    )
    plan = Plan(
        source=residual.ref,
        commit=residual.commit,
        model_class=adapted.model_class,
        names_from=adapted.names_from,
        config={"residual": residual.ref, "adapter": adapter.ref},
        adapter_config={},
        shards=tuple(
            ShardPlan(shard.path, shard.size, matrices.get(shard.path, ()))
            for shard in layout.shards
        ),
        carried=(),
        index=layout.index,
        side_files=layout.side_files,
        left_out=layout.left_out,
        refused=(),
        estimate=_UNKNOWN,
        fold=fold,
    )
    plan, scratch_budget = fit_to_disk(
        plan, layout, disk_budget=disk_budget, max_shard_size=max_shard_size, scratch=scratch
    )
    limits = _Limits(slots or usable_cores(), memory_budget, scratch_budget)
    cost = _estimate(plan, sizes_of(residual), limits)
    return dataclasses.replace(plan, estimate=cost)


def fold_bytes(plan: Plan, matrix: Matrix, device: str = "cpu") -> int:
    """Return the bytes of the device's memory one matrix needs while it is in flight."""
    compared = plan.fold is not None and plan.fold.original is not None
    itemsize = TORCH_DTYPES[matrix.dtype].itemsize
    shape = matrix.out_features, matrix.in_features
    return folding_bytes(*shape, matrix.rank, itemsize, compared=compared, device=device)


def _check_dtypes(adapter: Adapter) -> None:
    for key, tensor in adapter.tensors.items():
        if tensor.dtype not in TORCH_DTYPES:
            raise error_from(
                "unsupported_adapter",
                f"{key} of the adapter is {tensor.dtype}; only {', '.join(TORCH_DTYPES)} are added",
            )


def _check_twins(adapter: Adapter, twins: Sequence[tuple[str, str]]) -> None:
    for one, other in twins:
        first, second = adapter.tensors[one], adapter.tensors[other]
        if first.nbytes != second.nbytes or not all(
            mine == theirs for mine, theirs in zip(*map(adapter.chunks, (one, other)), strict=True)
        ):
            raise error_from(
                "tied_weight",
                f"{one} and {other} differ in the adapter, and the model has one tensor for both",
                hint="use the adapter unmerged, or a base with tie_word_embeddings set to false",
            )


def _check_copies(
    adapter: Adapter, residual: CheckpointSource, copies: Sequence[CarriedTensor]
) -> None:
    """Refuse targets' own weights beside their factors, unless they are the residual's."""
    import torch

    for copy in copies:
        dtype, stored = (TORCH_DTYPES[x.dtype] for x in (adapter.tensors[copy.key], copy))
        position = copy.start
        for chunk in adapter.chunks(copy.key):
            mine = memory_of(torch.frombuffer(bytearray(chunk), dtype=dtype).to(stored))
            if mine != residual.read(copy.shard, position, position + len(mine)):
                raise error_from(
                    "unsupported_adapter",
                    f"{copy.key}: the adapter stores the weight of a target, too, and it is not "
                    f"{copy.tensor} of {residual.ref}",
                    hint="save it again with save_embedding_layers=False, if the weight itself "
                    "was not trained",
                )
            position += len(mine)


def _pieces(
    adapter: Adapter, matrices: Sequence[Matrix], replaced: Sequence[CarriedTensor]
) -> dict[str, Piece]:
    keys = [key for matrix in matrices for key in (matrix.key_a, matrix.key_b)]
    keys += [tensor.key for tensor in replaced]
    found = ((key, adapter.tensors[key]) for key in keys)
    return {key: Piece(t.dtype, t.shape, t.start, t.stop) for key, t in found}


@dataclass(frozen=True, slots=True)
class _Original:
    ref: str | None = None
    commit: str | None = None
    places: Mapping[str, tuple[str, int]] = field(default_factory=dict)


def _find_original(lineage: Lineage, matrices: Sequence[Matrix], open_other: Open) -> _Original:
    """Open the model that the residual was made from, if it is within reach and fits.

    With a trained adapter the result is another model, which need not be held against it.
    """
    if lineage.original is None or not lineage.initial:
        return _Original()
    ref = lineage.original
    try:
        # A manifest names a folder by its absolute path, which needs no grammar.
        source = open_other(LocalRef(ref) if ref.startswith("/") else parse_ref(ref))
        tensors = read_layout(source).tensors
    except PissaError:
        return _Original()
    places = {}
    for matrix in matrices:
        tensor = tensors.get(matrix.tensor)
        if tensor is None or (tensor.dtype, tensor.shape) != (matrix.dtype, matrix.shape):
            return _Original()
        places[matrix.tensor] = (tensor.shard, tensor.start)
    return _Original(source.ref, source.commit, places)


@dataclass(frozen=True, slots=True)
class _Limits:
    slots: int
    memory: int | None
    scratch: int | None


def _estimate(plan: Plan, sizes: Mapping[str, int], limits: _Limits) -> Estimate:
    copied = sum(sizes[path] for path in plan.copied)
    written = copied + sum(shard.size for shard in plan.shards) + len(plan.new_index or "")
    pieces = plan.fold.pieces.values() if plan.fold else ()
    read = copied + sum(shard.fetched for shard in plan.shards)
    read += sum(piece.stop - piece.start for piece in pieces)

    def in_flight(device: str) -> int:
        flights = sorted((fold_bytes(plan, one, device) for one in plan.matrices), reverse=True)
        memory = sum(flights[: limits.slots])
        return memory if limits.memory is None else max([min(memory, limits.memory), *flights[:1]])

    peak_disk = written + 3 * _ROW_BYTES * len(plan.matrices)
    if limits.scratch is not None:
        peak_disk = scratch_peak(plan, sizes, 0, limits.scratch)
    return Estimate(
        read=read,
        written=written,
        adapter=0,
        peak_memory=IMPORT_FOOTPRINT + in_flight("cpu"),
        peak_disk=peak_disk,
        peak_device_memory=in_flight("cuda"),
    )
