"""What lies on a workbench before the work: the private copy, the factor part, a journal.

Where the source is a folder, the copy begins with its room reserved and what is known beforehand:
targets are written when they are done, and all that stays as it is follows as the checksum passes
it, so that it is read once. A download has to come whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from pissa_core.adapters.disk import outside
from pissa_core.journal import boot_id, whole_lines
from pissa_core.openfile import CHUNK
from pissa_core.plan import CarriedTensor, Plan, Run, ShardPlan
from pissa_core.ports import ByteRange, CheckpointSource
from pissa_core.tensorfile import Header, PatchFile, framed

Replace = Callable[[PatchFile], None]
"""Writes into the private copy what takes the place of tensors other than targets."""


def carried_of(plan: Plan, shard: ShardPlan) -> list[CarriedTensor]:
    """Return the tensors of this shard that the adapter stores whole."""
    return [tensor for tensor in plan.carried if tensor.shard == shard.path]


def replaced_of(plan: Plan, shard: ShardPlan) -> list[CarriedTensor]:
    """Return the tensors of this shard that an adapter takes the place of, other than targets."""
    replaced = () if plan.fold is None else plan.fold.replaced
    return [tensor for tensor in replaced if tensor.shard == shard.path]


def lay_ground(
    folder: Path,
    plan: Plan,
    shard: ShardPlan,
    source: CheckpointSource,
    header: Header,
    replace: Replace | None,
) -> list[ByteRange]:
    """Lay out an attempt's scratch folder, or take up what a dead attempt left in it.

    Nothing is synced yet, so that no core waits for the disk. What a crash of the machine loses
    shows in the checksums, which `_is_intact` takes of everything again; and by another boot id
    no range of the copy counts as untouched.

    Returns:
        The ranges of the copy that are still to be copied from the source, whoever did whatever
        before.
    """
    unchanged = _unchanged(plan, shard)
    first = _first_line(folder)
    pending = unchanged if first.get("pending") else []
    if _is_intact(folder, shard, header, first, pending):
        return pending
    for name in ("journal", "shard", "part"):
        (folder / name).unlink(missing_ok=True)  # may be linked to what has been sealed
    pending = unchanged if _begin_copy(shard, source, folder / "shard") else []
    if replace is not None:
        with PatchFile(folder / "shard") as copy:
            replace(copy)
    _begin_part(folder / "part", carried_of(plan, shard), shard, source, header)
    _begin_journal(folder, _checksum_around(folder, shard, header, pending), bool(pending))
    return pending


def part_ends(header: Header) -> dict[str, int]:
    """Return where each tensor of a part ends."""
    starts = list(header.starts.items())
    following = [*(start for _, start in starts[1:]), header.file_size]
    # A shard without targets has an empty part.
    return {name: end for (name, _), end in zip(starts, following, strict=bool(starts))}


def checksum_range(file: PatchFile, start: int, stop: int) -> str:
    """Return the checksum of ``[start, stop)`` as a journal spells it."""
    digest = xxhash.xxh3_128()
    _update(digest, file, start, stop)
    return digest.hexdigest()


def _unchanged(plan: Plan, shard: ShardPlan) -> list[ByteRange]:
    """Return the ranges of an output shard that are the source's."""
    others = [(tensor.start, tensor.stop) for tensor in replaced_of(plan, shard)]
    if shard.run is not None:
        others.append((0, len(_header_of(shard.run))))
    return list(outside([*_targets(shard), *others], shard.size))


def _targets(shard: ShardPlan) -> list[ByteRange]:
    return [(matrix.start, matrix.stop) for matrix in shard.matrices]


def _begin_copy(shard: ShardPlan, source: CheckpointSource, to: Path) -> bool:
    """Make the private copy; return whether what stays as it is has still to be copied."""
    if shard.run is not None:
        _copy_run(shard, shard.run, source, to)
        return source.rereads
    holes = [(0, shard.size)] if source.rereads else _targets(shard)
    whole = source.fetch(shard.source_path, to, holes=holes)
    return source.rereads and not whole


def _copy_run(shard: ShardPlan, run: Run, source: CheckpointSource, to: Path) -> None:
    """Put an output shard together from its header and a run of a source shard's tensors."""
    with PatchFile(to, create_size=shard.size) as copy:
        header = _header_of(run)
        copy.write(0, header)
        if not source.rereads:
            copy.write_all(len(header), source.stream(shard.source_path, run.start, run.stop))


def _begin_part(
    path: Path,
    carried: list[CarriedTensor],
    shard: ShardPlan,
    source: CheckpointSource,
    header: Header,
) -> None:
    """Reserve the part, and write what of it is known: its header, tensors stored whole."""
    with PatchFile(path, create_size=header.file_size) as part:
        part.write(0, header.encoded)
        for tensor in carried:
            start = shard.source_start(tensor.start)
            chunks = source.stream(shard.source_path, start, start + tensor.stop - tensor.start)
            part.write_all(header.starts[tensor.key], chunks)


def _begin_journal(folder: Path, around: str, pending: bool) -> None:
    """Make the journal, by which it is known that copy and part are laid out."""
    first = {"boot": boot_id(), "around": around, "pending": pending}
    (folder / "journal.new").write_text(json.dumps(first) + "\n")
    (folder / "journal.new").rename(folder / "journal")


def _header_of(run: Run) -> bytes:
    return framed(run.header.encode())


def _first_line(folder: Path) -> Mapping[str, Any]:
    """Return what a dead attempt wrote when all was laid out; nothing if it did not get there."""
    if not all((folder / name).is_file() for name in ("journal", "shard", "part")):
        return {}
    return next(whole_lines(folder / "journal"), {})


def _is_intact(
    folder: Path,
    shard: ShardPlan,
    header: Header,
    first: Mapping[str, Any],
    pending: list[ByteRange],
) -> bool:
    """Whether all is as a dead attempt laid it out that neither its journal nor we account for."""
    if "around" not in first:
        return False
    sizes = (folder / "shard").stat().st_size, (folder / "part").stat().st_size
    if sizes != (shard.size, header.file_size):
        return False
    return bool(first["around"] == _checksum_around(folder, shard, header, pending))


def _checksum_around(
    folder: Path, shard: ShardPlan, header: Header, pending: list[ByteRange]
) -> str:
    """Checksum what of copy and part is neither a target's nor still to be copied."""
    digest = xxhash.xxh3_128()
    factors = {key for matrix in shard.matrices for key in (matrix.key_a, matrix.key_b)}
    ends = part_ends(header)
    part_holes = [(header.starts[key], ends[key]) for key in header.starts if key in factors]
    for name, size, gaps in (
        ("shard", shard.size, [*_targets(shard), *pending]),
        ("part", header.file_size, part_holes),
    ):
        with PatchFile(folder / name) as file:
            for start, stop in outside(gaps, size):
                _update(digest, file, start, stop)
    return digest.hexdigest()


def _update(digest: xxhash.xxh3_128, file: PatchFile, start: int, stop: int) -> None:
    for begin in range(start, stop, CHUNK):
        buffer = bytearray(min(CHUNK, stop - begin))
        file.read_into(begin, memoryview(buffer))
        digest.update(buffer)
