"""Scratch of one shard while it is being converted: private copy, factor part, journal.

Matrices finish in any order; each is written in place and journalled with checksums of what was
written. An attempt that follows a dead one checks them and does only what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from pissa_core.adapters.disk import file_info
from pissa_core.groundwork import (
    Replace,
    carried_of,
    checksum_range,
    lay_ground,
    part_ends,
    replaced_of,
)
from pissa_core.journal import Journal
from pissa_core.plan import Matrix, Plan, ShardPlan
from pissa_core.ports import ByteRange, CheckpointSource, Seal
from pissa_core.settling import Copying, Settling
from pissa_core.tensorfile import Entry, Header, PatchFile, empty, make_header, memory_of

JOURNAL_BYTES = 16 << 10
"""Bytes of an attempt that no matrix adds: folder, lock, a journal's first line, partly filled
blocks."""

_ROW_BYTES = 1024
_SIGMA_BYTES = 24
_NBYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SPELLED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def part_entries(plan: Plan, shard: ShardPlan) -> list[Entry]:
    """Return what a shard contributes to the adapter, in the order of its part file.

    Where an adapter is folded in, none comes out, and the part is empty.
    """
    if plan.fold is not None:
        return []
    dtype = plan.config["adapter_dtype"]
    entries = []
    for matrix in shard.matrices:
        shapes = (matrix.rank, matrix.in_features), (matrix.out_features, matrix.rank)
        for key, shape in zip((matrix.key_a, matrix.key_b), shapes, strict=True):
            nbytes = shape[0] * shape[1] * _NBYTES[dtype]
            entries.append(Entry(key, _SPELLED[dtype], shape, nbytes))
    entries += [
        Entry(tensor.key, tensor.dtype, tensor.shape, tensor.stop - tensor.start)
        for tensor in carried_of(plan, shard)
    ]
    return entries


def scratch_bytes(plan: Plan, shard: ShardPlan) -> int:
    """Return the bytes of disk that one attempt at a shard takes: copy, part, journal."""
    part = make_header(part_entries(plan, shard)).file_size
    return shard.size + part + JOURNAL_BYTES + sum(row_bytes(m) for m in shard.matrices)


def row_bytes(matrix: Matrix) -> int:
    """Return an upper bound of what one matrix adds to a journal, a seal or the manifest."""
    return _ROW_BYTES + 3 * len(matrix.tensor.encode()) + _SIGMA_BYTES * matrix.rank


def stays_as_it_is(plan: Plan, shard: ShardPlan) -> bool:
    """Whether a shard is a file of the source, nothing of which is changed or carried."""
    whole = shard.run is None and not shard.matrices
    return whole and not replaced_of(plan, shard) and not carried_of(plan, shard)


class Workbench:
    """The files of one attempt at one shard, open; safe to use from several threads."""

    def __init__(
        self,
        shard: ShardPlan,
        source: CheckpointSource,
        header: Header,
        copy: PatchFile,
        part: PatchFile,
        journal: Journal,
        *,
        pending: Sequence[ByteRange],
        read_again: bool,
    ) -> None:
        self._shard = shard
        self._source = source
        self._header = header
        self._copy = copy
        self._part = part
        self._journal = journal
        self.rows = self._verified_rows()
        unwritten = [(m.start, m.stop) for m in shard.matrices if m.tensor not in self.rows]
        copying = Copying(tuple(pending), self._copy_from_source)
        self.settling = Settling(copy, shard.size, unwritten, copying, read_again=read_again)

    def original(
        self, matrix: Matrix, *, pinned: bool = False, memory: Tensor | None = None
    ) -> Tensor:
        """Return the matrix as the source has it, in its own dtype and stored shape.

        `pinned`, `memory`: where it is to lie, as of `tensorfile.empty`.

        A downloaded copy serves as its own original until its range is first written; after
        that, only the source can tell what was there.
        """
        tensor, buffer = empty(matrix.shape, matrix.dtype, pinned=pinned, memory=memory)
        if self._source.rereads or not self._journal.untouched(matrix.tensor):
            start = self._shard.source_start(matrix.start)
            self._source.read_into(self._shard.source_path, start, buffer)
        else:
            self._copy.read_into(matrix.start, buffer)
        return tensor

    def finish(
        self,
        matrix: Matrix,
        stored: Tensor,
        factors: Mapping[str, Tensor],
        row: Mapping[str, Any],
    ) -> None:
        """Write a matrix, as it is stored, and its factors in place, then journal them."""
        self._journal.begin(matrix.tensor)
        pieces = [(self._copy, matrix.start, memory_of(stored.contiguous()))]
        for key in self._factors(matrix):
            start = self._header.starts[key]
            pieces.append((self._part, start, memory_of(factors[key].contiguous())))
        for file, start, data in pieces:
            file.write(start, data)
        self._journal.done(matrix.tensor, [_checksum(data) for *_, data in pieces], row)
        self.settling.done(matrix.start)

    def close_shard(self, rows: tuple[Mapping[str, Any], ...], folder: Path) -> Seal:
        """Sync both files and take their checksums."""
        copy_info = self.settling.finish()
        self._part.sync()
        part_info = file_info(folder / "part")
        return Seal(
            shard=self._shard.path,
            sha256=copy_info.sha256 or "",
            size=copy_info.size,
            part_sha256=part_info.sha256 or "",
            part_size=part_info.size,
            rows=rows,
        )

    def _copy_from_source(self, start: int, buffer: memoryview) -> None:
        self._source.read_into(self._shard.source_path, self._shard.source_start(start), buffer)

    def _verified_rows(self) -> dict[str, Mapping[str, Any]]:
        """Return the rows of journalled matrices whose bytes are all still as journalled."""
        rows = {}
        for matrix in self._shard.matrices:
            entry = self._journal.finished.get(matrix.tensor)
            if entry is not None and self._checksums(matrix) == entry["checksums"]:
                rows[matrix.tensor] = entry["row"]
        return rows

    def _checksums(self, matrix: Matrix) -> list[str]:
        starts = self._header.starts
        ends = part_ends(self._header)
        return [
            checksum_range(self._copy, matrix.start, matrix.stop),
            *(checksum_range(self._part, starts[key], ends[key]) for key in self._factors(matrix)),
        ]

    def _factors(self, matrix: Matrix) -> list[str]:
        """Return the keys of a matrix's factors in the part, which a fold has none of."""
        return [key for key in (matrix.key_a, matrix.key_b) if key in self._header.starts]


@contextmanager
def open_workbench(
    folder: Path,
    plan: Plan,
    shard: ShardPlan,
    source: CheckpointSource,
    *,
    replace: Replace | None = None,
    read_again: bool = False,
) -> Iterator[Workbench]:
    """Lay out an attempt's scratch folder, or take up what a dead attempt left in it.

    Args:
        folder: the scratch.
        plan: what is done.
        shard: the part of it that is done here.
        source: the checkpoint.
        replace: what else is written into the private copy.
        read_again: whether the finished copy is soon read, so that memory should hold it.
    """
    header = make_header(part_entries(plan, shard))
    pending = lay_ground(folder, plan, shard, source, header, replace)
    journal = Journal(folder / "journal")
    try:
        with PatchFile(folder / "shard") as copy, PatchFile(folder / "part") as part:
            bench = Workbench(
                shard, source, header, copy, part, journal, pending=pending, read_again=read_again
            )
            try:
                yield bench
            finally:
                bench.settling.close()
    finally:
        journal.close()


def _checksum(data: memoryview) -> str:
    return xxhash.xxh3_128_hexdigest(data)
