"""One unit of a case, read once: checksums taken, tensors compared, targets recombined."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from pissa_core.errors import CheckpointError
from pissa_core.events import MatrixDone, ShardStarted
from pissa_core.layout import TensorInfo, read_header, read_layout
from pissa_core.layout.sidefiles import INITIAL, MANIFEST
from pissa_core.plan import Matrix, row_of
from pissa_core.ports import CheckpointSource
from pissa_core.tensorfile import TORCH_DTYPES, empty
from pissa_core.verify.case import OTHERS, Case, Fault, of_a_tool
from pissa_core.verify.matrix import UNIT, Recombination
from pissa_core.verify.reading import PIECE, Original, Tape, first_difference, pieces

ADAPTER = f"{INITIAL}/adapter_model.safetensors"


@dataclass(slots=True)
class Finding:
    """What one unit came to.

    Attributes:
        files: path → sha256 and size, as read.
        checked: check → how many things it looked at.
    """

    path: str
    nbytes: int
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=dict)

    def note(self, check: str, where: str, what: str) -> None:
        """Note a fault."""
        self.faults.append(Fault(check, where, what))

    def count(self, check: str) -> None:
        """Count one more thing looked at."""
        self.checked[check] = self.checked.get(check, 0) + 1

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Compared:
    """Some bytes of a tensor that is no target were compared."""

    nbytes: int


@dataclass(frozen=True, slots=True)
class Examined:
    """A unit is done."""

    finding: Finding


@dataclass(frozen=True, slots=True)
class Examiner:
    """The two checkpoints of a case, open; cancelled by not asking for the next event."""

    case: Case
    original: CheckpointSource
    converted: CheckpointSource
    tensors: Mapping[str, TensorInfo]
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, case: Case, original: CheckpointSource, converted: CheckpointSource) -> Examiner:
        """Read the original's headers again, which takes no PEFT."""
        layout = read_layout(original)
        sizes = {shard.path: shard.size for shard in layout.shards}
        return cls(case, original, converted, layout.tensors, sizes)

    def unit(self, path: str) -> Iterator[ShardStarted | MatrixDone | Compared | Examined]:
        """Look at one unit."""
        targets = {m.tensor: m for m in self.case.matrices if m.shard == path}
        yield ShardStarted(path, len(targets), 0)
        nbytes = next(unit.size for unit in self.case.units if unit.path == path)
        finding = Finding(path, nbytes)
        if path == OTHERS:
            self._others(finding)
        elif path == ADAPTER:
            self._adapter(finding)
        else:
            yield from self._shard(path, targets, finding)
        yield Examined(finding)

    def _shard(
        self, path: str, targets: Mapping[str, Matrix], finding: Finding
    ) -> Iterator[MatrixDone | Compared]:
        size = self.converted.files()[path].size
        tape, original = Tape(self.converted, path, 0, size), Original(self.original)
        try:
            header = read_header(self.converted, path, size)
        except CheckpointError as error:
            finding.note("tensors", path, error.message)
            self._hash(path, finding)
            return
        tape.take(header.header_size)
        for tensor in header.tensors:
            matrix = targets.get(tensor.name)
            if matrix is not None:
                yield self._target(matrix, tape, original, finding)
            else:
                yield from self._untouched(tensor, tape, original, finding)
        finding.files[path] = {"sha256": tape.digest.hexdigest(), "size": size}
        finding.count("files")

    def _open(self, name: str, original: Original) -> Tape:
        theirs = self.tensors[name]
        return original.open(theirs.shard, theirs.start, theirs.stop, self.sizes[theirs.shard])

    def _untouched(
        self, tensor: TensorInfo, tape: Tape, original: Original, finding: Finding
    ) -> Iterator[Compared]:
        theirs = self.tensors.get(tensor.name)
        if theirs is None or (theirs.dtype, theirs.shape) != (tensor.dtype, tensor.shape):
            # Said already, from the headers.
            for start, stop in pieces(tensor.nbytes):
                tape.take(stop - start)
            return
        other = self._open(tensor.name, original)
        differs = None
        for start, stop in pieces(tensor.nbytes):
            mine, wanted = tape.take(stop - start), other.take(stop - start)
            if differs is None and mine != wanted:
                differs = start + first_difference(mine, wanted)
            yield Compared(stop - start)
        finding.count("tensors")
        if differs is not None:
            finding.note(
                "tensors",
                tensor.name,
                f"it is no target, and differs from the original at byte {differs} of "
                f"{tensor.nbytes} ({tensor.shard})",
            )

    def _target(
        self, matrix: Matrix, tape: Tape, original: Original, finding: Finding
    ) -> MatrixDone:
        began = time.perf_counter()
        found = self._recombination(matrix)
        other = self._open(matrix.tensor, original)
        rows, columns = matrix.shape
        row_bytes = columns * TORCH_DTYPES[matrix.dtype].itemsize
        for start, stop in pieces(rows, max(1, PIECE // row_bytes)):
            count = (stop - start) * row_bytes
            W, R = (_matrix(t.take(count), matrix.dtype, columns) for t in (other, tape))
            found.add(start, W, R)
        finding.count("targets")
        row = self._row(matrix, found)
        if not found.worst <= 1:
            i, j = found.place
            finding.note(
                "targets",
                matrix.module,
                f"{matrix.tensor}[{i}, {j}] is off by {found.worst:.3g} times what rounding allows",
            )
        return MatrixDone(matrix.shard, row, rows * row_bytes, time.perf_counter() - began)

    def _recombination(self, matrix: Matrix) -> Recombination:
        a, b = (self._factor(key).float() for key in (matrix.key_a, matrix.key_b))
        right = a.t().contiguous()
        dtype = TORCH_DTYPES[matrix.dtype]
        # Without a manifest nobody says how it was rounded, so either way is allowed for.
        as_peft = self.case.config.get("rounding", "peft") == "peft" and dtype != torch.float32
        left, right = (right, b) if matrix.transposed else (b, right)
        return Recombination(left, right, matrix.scaling, dtype, UNIT[dtype] if as_peft else 0.0)

    def _factor(self, key: str) -> Tensor:
        piece = self.case.pieces[key]
        rows, columns = piece.shape
        tensor, buffer = empty((rows, columns), piece.dtype)
        self.converted.read_into(ADAPTER, piece.start, buffer)
        return tensor

    def _row(self, matrix: Matrix, found: Recombination) -> dict[str, Any]:
        sigma = found.sigma()
        captured, norm = sum(value * value for value in sigma), found.norm
        # A weight that is not finite makes figures that JSON has no words for.
        finite = math.isfinite(norm) and math.isfinite(found.error) and math.isfinite(captured)
        return row_of(matrix) | {
            "sigma": sigma if math.isfinite(captured) else [],
            "energy": min(1.0, captured / norm / norm) if finite and norm > 0 else 0.0,
            "recombination_error": found.error if finite else None,
            "bound_used": min(found.worst, 1e30),
            "passed": found.worst <= 1,
        }

    def _adapter(self, finding: Finding) -> None:
        self._hash(ADAPTER, finding)
        original = Original(self.original)
        for tensor in self.case.carried:
            piece = self.case.pieces[tensor.key]
            mine = Tape(self.converted, ADAPTER, piece.start, piece.stop)
            theirs = self._open(tensor.tensor, original)
            finding.count("adapter")
            if any(
                mine.take(stop - start) != theirs.take(stop - start)
                for start, stop in pieces(tensor.stop - tensor.start)
            ):
                finding.note(
                    "adapter", tensor.key, f"it is stored whole, and is not {tensor.tensor}"
                )

    def _others(self, finding: Finding) -> None:
        units = {unit.path for unit in self.case.units}
        ours, theirs = self.converted.files(), self.original.files()
        for path in sorted(ours.keys() - units):
            listed = self.case.manifest.get("files")
            stated = isinstance(listed, dict) and path in listed
            if path == MANIFEST or (of_a_tool(path) and not stated):
                continue
            self._hash(path, finding)
            if path in self.case.side_files and path in theirs:
                finding.count("side files")
                if not self._is_the_originals(path, finding.files[path]):
                    finding.note("side files", path, "it is not the original's")

    def _is_the_originals(self, path: str, ours: Mapping[str, Any]) -> bool:
        size = self.original.files()[path].size
        if size != ours["size"]:  # not read, since nobody has looked how large it is
            return False
        tape = Tape(self.original, path, 0, size)
        for start, stop in pieces(size):
            tape.take(stop - start)
        return bool(tape.digest.hexdigest() == ours["sha256"])

    def _hash(self, path: str, finding: Finding) -> None:
        size = self.converted.files()[path].size
        tape = Tape(self.converted, path, 0, size)
        for start, stop in pieces(size):
            tape.take(stop - start)
        finding.files[path] = {"sha256": tape.digest.hexdigest(), "size": size}
        finding.count("files")


def _matrix(data: bytearray, dtype: str, columns: int) -> Tensor:
    return torch.frombuffer(data, dtype=TORCH_DTYPES[dtype]).view(-1, columns)


def examine(
    case: Case, original: CheckpointSource, converted: CheckpointSource
) -> Iterator[ShardStarted | MatrixDone | Compared | Examined]:
    """Look at every unit of a case in turn, in this process."""
    examiner = Examiner.of(case, original, converted)
    for unit in case.units:
        yield from examiner.unit(unit.path)
