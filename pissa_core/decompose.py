"""The matrices of one shard: read, split, written; several in flight, as memory allows."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pissa_core.buffers import Buffers
from pissa_core.errors import NonFiniteWeight, OutOfMemory
from pissa_core.events import MatrixDone
from pissa_core.headstart import HeadStart
from pissa_core.plan import Matrix, name_of, row_of
from pissa_core.planning import matrix_bytes
from pissa_core.runtime import Resolved, compute
from pissa_core.shortage import named
from pissa_core.spec import PissaConfig
from pissa_core.split import matrix_seed, split_principal
from pissa_core.workbench import Workbench

_CPU = torch.device("cpu")
_log = logging.getLogger(__name__)


def decompose(
    matrices: list[Matrix],
    config: PissaConfig,
    bench: Workbench,
    resolved: Resolved,
    head_start: HeadStart | None = None,
) -> Generator[MatrixDone]:
    """Split each matrix and write its residual and factors; yield each as it is done.

    Reading, arithmetic and writing overlap, since every matrix has a thread of its own. On a GPU
    each matrix has a stream and page-locked buffers of its own as well, so that copies in both
    directions overlap with the arithmetic of other matrices, and nothing waits for the device as a
    whole. Where memory runs out there is one slot less from then on; a matrix that is too large for
    a GPU even alone is done on the CPU, and its row says so.

    Raises:
        OutOfMemory: if a matrix does not fit even alone.
        NonFiniteWeight: naming the tensor and the first bad entry.
    """
    if head_start is not None:
        head_start.close()
    job = _Job(config, bench, head_start)
    sized = [(matrix, job.nbytes(matrix, resolved.device)) for matrix in matrices]
    lanes = _Lanes(resolved.device)
    # Memory is kept for the next matrix within what the budget allows, and the largest will take.
    largest = sorted((nbytes for _, nbytes in sized), reverse=True)[: resolved.slots]
    most = min(resolved.budget, sum(largest))

    def begins(matrix: Matrix, in_flight: int) -> None:
        lanes.expect(matrix, spare=most - in_flight)

    def work(matrix: Matrix, device: torch.device) -> MatrixDone:
        return job.run(matrix, lanes=lanes if device == resolved.device else _Lanes(device))

    yield from compute(resolved, work, sized, name=name_of, begins=begins)


@dataclass(frozen=True, slots=True)
class _Job:
    """What all matrices have in common."""

    config: PissaConfig
    bench: Workbench
    head_start: HeadStart | None

    def nbytes(self, matrix: Matrix, device: torch.device) -> int:
        """Return what a matrix takes in flight, of the device's memory on a GPU."""
        config = self.config
        return matrix_bytes(matrix, config.svd.method, config.rounding, device=device.type)

    def run(self, matrix: Matrix, *, lanes: _Lanes) -> MatrixDone:
        """Split one matrix in a lane and write what came out."""
        began = time.perf_counter()
        needed = partial(self.nbytes, matrix, lanes.device)
        try:
            with (
                named(name_of(matrix), lanes.device, needed),
                lanes.own(),
                lanes.memory(matrix) as memory,
            ):
                row, *results = self._split(matrix, lanes, memory)
                residual, a, b = lanes.to_host(*results)
                del results
                stored = residual.t() if matrix.transposed else residual
                self.bench.finish(matrix, stored, {matrix.key_a: a, matrix.key_b: b}, row)
        except NonFiniteWeight as error:
            where = " of its transpose" if matrix.transposed else ""
            raise NonFiniteWeight(
                f"{matrix.tensor}: {error.message}{where}", hint=error.hint
            ) from error
        except OutOfMemory:
            lanes.clear()
            raise
        nbytes = matrix.stop - matrix.start
        return MatrixDone(matrix.shard, row, nbytes, time.perf_counter() - began)

    def _split(
        self, matrix: Matrix, lanes: _Lanes, memory: Tensor | None
    ) -> tuple[dict[str, Any], Tensor, Tensor, Tensor]:
        stored = lanes.to_device(self.bench.original(matrix, pinned=lanes.pinned, memory=memory))
        split = split_principal(
            stored.t() if matrix.transposed else stored,
            matrix.rank,
            scaling=matrix.scaling,
            svd=self.config.svd,
            seed=matrix_seed(self.config.svd.seed, matrix.tensor),
            rounding=self.config.rounding,
            adapter_dtype=getattr(torch, self.config.adapter_dtype),
            found=None if self.head_start is None else self.head_start.take(matrix),
            overwrite=True,
        )
        row = row_of(matrix) | split.certificate.as_row() | {"device": lanes.device.type}
        return row, split.R, split.A, split.B


# Streams that nobody uses. For each thread and stream that ever multiplied torch keeps a workspace
# of cuBLAS, 32 MB on some GPUs (pytorch/pytorch#184084): new streams for each shard would add up.
_idle_streams: dict[torch.device, list[Any]] = defaultdict(list)


class _Lanes:
    """A stream of its own for each matrix on a GPU; nothing on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pinned = device.type == "cuda"
        self._buffers = Buffers()

    @contextmanager
    def own(self) -> Iterator[None]:
        """Have a stream that nobody else uses be this thread's current one."""
        if not self.pinned:
            yield
            return
        idle = _idle_streams[self.device]
        try:
            stream = idle.pop()
        except IndexError:
            stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        try:
            torch.cuda.set_device(self.device)  # or leaving the stream would make one of the first
            with torch.cuda.stream(stream):
                yield
        finally:
            idle.append(stream)

    def expect(self, matrix: Matrix, *, spare: int) -> None:
        """Have `memory` be asked for a matrix, and hold no more than `spare` bytes besides."""
        if not self.pinned:
            self._buffers.expect(matrix.stop - matrix.start, spare)

    def memory(self, matrix: Matrix) -> AbstractContextManager[Tensor | None]:
        """Lend memory for a matrix on the CPU; page-locked memory is torch's to reuse."""
        return nullcontext() if self.pinned else self._buffers.taken(matrix.stop - matrix.start)

    def clear(self) -> None:
        """Let go of memory that no matrix has."""
        self._buffers.clear()

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy to the device without waiting; a page-locked source is kept until it is read."""
        return tensor.to(self.device, non_blocking=True)

    def to_host(self, *tensors: Tensor) -> list[Tensor]:
        """Copy to page-locked memory, and wait for this matrix's stream alone."""
        if not self.pinned:
            return list(tensors)
        copies = [torch.empty_like(t, device=_CPU, pin_memory=True) for t in tensors]
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream(self.device).synchronize()
        return copies
