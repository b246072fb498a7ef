"""Folding done to a shard: its matrices one by one, and the tensors an adapter stores whole."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pissa_core.errors import (
    AccessError,
    PissaError,
    SourceChanged,
    UnsupportedAdapter,
)
from pissa_core.events import MatrixDone
from pissa_core.fold.adapter import WEIGHTS
from pissa_core.fold.arithmetic import compare, fold_in
from pissa_core.fold.belonging import check_is_listed
from pissa_core.fold.planning import fold_bytes
from pissa_core.openfile import CHUNK
from pissa_core.plan import CarriedTensor, Fold, Matrix, Plan, ShardPlan, name_of, row_of
from pissa_core.ports import CheckpointSource
from pissa_core.runtime import Resolved, compute
from pissa_core.shortage import named
from pissa_core.tensorfile import TORCH_DTYPES, PatchFile, empty, memory_of
from pissa_core.workbench import Workbench


@dataclass(frozen=True, slots=True)
class Beside:
    """What a fold reads besides the residual model."""

    adapter: CheckpointSource
    original: CheckpointSource | None


@dataclass(frozen=True, slots=True)
class Folding:
    """Folds the adapter of a plan into what it is given."""

    plan: Plan
    fold: Fold
    beside: Beside

    def matrices(
        self, matrices: list[Matrix], bench: Workbench, resolved: Resolved
    ) -> Generator[MatrixDone]:
        """Fold the adapter into each matrix, several in flight; yield each as it is done."""
        sized = [
            (matrix, fold_bytes(self.plan, matrix, resolved.device.type)) for matrix in matrices
        ]
        yield from compute(resolved, partial(self._matrix, bench), sized, name=name_of)

    def _matrix(self, bench: Workbench, matrix: Matrix, device: torch.device) -> MatrixDone:
        began = time.perf_counter()
        with named(name_of(matrix), device, partial(fold_bytes, self.plan, matrix, device.type)):
            row, merged = self._merged(matrix, bench.original(matrix), device)
        bench.finish(matrix, merged, {}, row)
        nbytes = matrix.stop - matrix.start
        return MatrixDone(matrix.shard, row, nbytes, time.perf_counter() - began)

    def _merged(
        self, matrix: Matrix, stored: Tensor, device: torch.device
    ) -> tuple[dict[str, Any], Tensor]:
        stored = stored.to(device)
        a, b = (self._factor(key).to(device) for key in (matrix.key_a, matrix.key_b))
        try:
            weight = stored.t() if matrix.transposed else stored
            share = fold_in(weight, b, a, scaling=matrix.scaling)
        except PissaError as error:
            raise type(error)(f"{matrix.tensor}: {error.message}", hint=error.hint) from error
        merged = stored.cpu()
        return row_of(matrix) | {"update": share} | self._likeness(matrix, merged), merged

    def replace(self, residual: CheckpointSource, shard: ShardPlan, copy: PatchFile) -> None:
        """Write the tensors that the adapter stores whole over those of a shard.

        Raises:
            WrongBase: if the shard is not the one that the residual's manifest lists.
        """
        if self._answers_for_its_source(shard):
            check_is_listed(residual, shard.source_path, self.fold.listed)
        for tensor in self.fold.replaced:
            if tensor.shard == shard.path:
                self._replace(tensor, copy)

    def _answers_for_its_source(self, shard: ShardPlan) -> bool:
        """Whether a shard is the one, of all that a source shard becomes, that has it checked.

        A folder knows no checksum, and a giant is to be read for it once, not once a run.
        """
        first = next(one for one in self.plan.shards if one.source_path == shard.source_path)
        return first.path == shard.path

    def _replace(self, tensor: CarriedTensor, copy: PatchFile) -> None:
        piece = self.fold.pieces[tensor.key]
        dtype, stored = TORCH_DTYPES[piece.dtype], TORCH_DTYPES[tensor.dtype]
        position = tensor.start
        for start in range(piece.start, piece.stop, CHUNK):
            chunk = bytearray(min(CHUNK, piece.stop - start))
            self.beside.adapter.read_into(WEIGHTS, start, memoryview(chunk))
            values = torch.frombuffer(chunk, dtype=dtype).to(stored)
            if not bool(torch.isfinite(values).all()):
                raise UnsupportedAdapter(
                    f"{tensor.key} of the adapter holds values that {tensor.dtype}, the dtype of "
                    f"{tensor.tensor}, has none for: NaN, Inf or too large",
                    hint="the training diverged; take an earlier checkpoint, or use the adapter "
                    "unmerged",
                )
            copy.write(position, memory_of(values))
            position += values.nbytes

    def _factor(self, key: str) -> Tensor:
        piece = self.fold.pieces[key]
        rows, columns = piece.shape
        tensor, buffer = empty((rows, columns), piece.dtype)
        self.beside.adapter.read_into(WEIGHTS, piece.start, buffer)
        return tensor

    def _likeness(self, matrix: Matrix, merged: Tensor) -> dict[str, Any]:
        """Hold a merged matrix against the original's, where there is one to hold it against."""
        original = self.beside.original
        if original is None:
            return {}
        theirs, buffer = empty(matrix.shape, matrix.dtype)
        shard, start = self.fold.places[matrix.tensor]
        try:
            original.read_into(shard, start, buffer)
        except AccessError as error:
            raise SourceChanged(
                f"{shard} of the original can no longer be read: {error.message}",
                hint="run again: without the original, nothing is held against it",
            ) from error
        found = compare(merged, theirs)
        return {
            "weights": merged.numel(),
            "equal_weights": found.equal,
            "max_ulps": found.max_ulps,
            "recombination_error": found.distance,
        }
