"""Whether a plan keeps within the bytes it is given, of disk for its scratch and of memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pissa_core.adapters.ledger import disk_too_small
from pissa_core.errors import MemoryTooSmall
from pissa_core.plan import Matrix, Plan, ShardPlan
from pissa_core.ports import CheckpointSource
from pissa_core.workbench import row_bytes, scratch_bytes

_SMALL = 16 << 20  # up to this the Hub may keep a file in git, and it lies here until the commit
_REPORT_BYTES = 1 << 20  # card, pictures, index: what there is of them beside one row a matrix


def sizes_of(source: CheckpointSource) -> Mapping[str, int]:
    """Return the size of each of a checkpoint's files."""
    return {path: info.size for path, info in source.files().items()}


def publish_bytes(plan: Plan, sizes: Mapping[str, int], adapter: int) -> int:
    """Return the disk that publishing takes where nothing else of the result lies here.

    The adapter and large files of the source lie here one at a time, small ones together.
    """
    files = [sizes[path] for path in plan.side_files]
    small = sum(size for size in files if size <= _SMALL) + sum(row_bytes(m) for m in plan.matrices)
    return max([adapter, *files]) + small + _REPORT_BYTES


def check_disk_budget(plan: Plan, capacity: int, *, sizes: Mapping[str, int] | None = None) -> None:
    """Refuse a plan of which one piece alone is more than may lie on the disk.

    Args:
        plan: of any kind, its shards divided as far as they can be.
        capacity: bytes that work in progress may take.
        sizes: of the source's files, if the result goes elsewhere: publishing passes through
            the scratch folder then.

    Raises:
        DiskTooSmall: with the budget that would do for all of it.
    """
    needs = {scratch_bytes(plan, shard): shard for shard in plan.shards}
    largest = max(needs)
    last = 0 if sizes is None else publish_bytes(plan, sizes, plan.estimate.adapter)
    if largest > capacity:
        what = _piece(needs[largest])
        raise disk_too_small(largest, capacity, what=what, least=max(largest, last))
    if last > capacity:
        raise disk_too_small(last, capacity, what="the adapter, one file,")


def check_memory_budget(plan: Plan, budget: int, needs: Callable[[Matrix], int]) -> None:
    """Refuse a plan of which one matrix alone needs more memory than all may have.

    Args:
        plan: of any kind.
        budget: bytes that matrices in flight may take together.
        needs: returns the bytes of one in flight.

    Raises:
        MemoryTooSmall: with both numbers.
    """
    largest = max(plan.matrices, key=needs, default=None)
    if largest is not None and (needed := needs(largest)) > budget:
        raise MemoryTooSmall(
            f"{largest.tensor} {list(largest.shape)} needs {needed:,} bytes in flight and the "
            f"memory budget is {budget:,}",
            hint="raise --memory-budget, or exclude the module",
        )


def _piece(shard: ShardPlan) -> str:
    """Say what a shard is to whoever knows only the source's files."""
    if shard.run is None:
        return shard.source_path
    whole, held = shard.source_path, f"{shard.fetched:,} bytes"
    return f"{shard.path}, the largest piece that {whole} can be divided into ({held} of it),"
