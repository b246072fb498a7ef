"""Singular vectors that are computed while the plan is still being made.

Planning keeps one core busy for seconds with importing transformers and PEFT. What the plan will
say can mostly be guessed from names and shapes alone; a guess costs nothing but time of a core
that has nothing else to do, and a wrong one is dropped. The result of a matrix depends on its
name, bytes and config alone, so the output is the same to the bit with and without.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import torch

from pissa_core.buffers import Buffers
from pissa_core.errors import PissaError
from pissa_core.footprint import working_bytes
from pissa_core.layout import Layout, TensorInfo, read_layout
from pissa_core.plan import Matrix
from pissa_core.ports import CheckpointSource
from pissa_core.runtime import Resolved
from pissa_core.slots import usable_cores
from pissa_core.spec import PissaConfig
from pissa_core.split import matrix_seed
from pissa_core.svd import TruncatedSvd, truncated_svd
from pissa_core.tensorfile import TORCH_DTYPES, empty

_MOST_HELD = 64 << 20  # bytes of triplets waiting for the plan
_MOST_FLOPS = 1e11  # about a second: nobody should wait longer for a guess that was wrong
_STEPS = 10
_LAYER = re.compile(r"(^|\.)\d+\.")


class HeadStart:
    """Truncated SVDs of matrices that the plan will likely hold, begun before it is there."""

    def __init__(self, source: CheckpointSource, config: PissaConfig, resolved: Resolved) -> None:
        """Begin, with all cores but one; `close` when the matrices' turn has come."""
        self._source, self._config = source, config
        self._held, self._lock = 0, threading.Lock()
        self._futures: dict[str, Future[TruncatedSvd | None]] = {}
        self._buffers = Buffers()
        try:
            guessed = list(_guess(source, config, resolved))
        except PissaError:  # the planner meets it, too, and says so
            guessed = []
        threads = min(usable_cores() - 1, resolved.slots)
        if guessed and threads:
            threads = min(threads, resolved.budget // max(size for _, size in guessed))
        if not guessed or threads < 1:
            return
        # Each thread may have the largest in flight: what it reads the others into is no larger.
        self._buffers = Buffers(spare=threads * max(info.nbytes for info, _ in guessed))
        pool = ThreadPoolExecutor(
            threads, "head-start", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._futures = {info.name: pool.submit(self._find, info) for info, _ in guessed}
        pool.shutdown(wait=False)

    def close(self) -> None:
        """Begin nothing more; what is done or under way can still be taken."""
        for future in self._futures.values():
            future.cancel()
        self._buffers.close()

    def take(self, matrix: Matrix) -> TruncatedSvd | None:
        """Return what was found for a matrix, if its guess was right; waits if it is under way."""
        future = self._futures.pop(matrix.tensor, None)
        if future is None or matrix.transposed or matrix.rank != self._config.rank:
            return None
        try:
            found = future.result()
        except (CancelledError, MemoryError, RuntimeError, ValueError, OSError):
            return None  # whatever it is, the conversion itself will meet it and say so
        if found is not None:
            self._count(-_nbytes(matrix.shape, matrix.rank))
        return found

    def _find(self, info: TensorInfo) -> TruncatedSvd | None:
        rank, svd = self._config.rank, self._config.svd
        if not self._count(_nbytes(info.shape, rank)):
            return None
        with self._buffers.taken(info.nbytes) as memory:
            tensor, buffer = empty((info.shape[0], info.shape[1]), info.dtype, memory=memory)
            self._source.read_into(info.shard, info.start, buffer)
            return truncated_svd(
                tensor,
                rank,
                method=svd.method,
                tolerance=svd.tolerance,
                niter=svd.niter,
                seed=matrix_seed(svd.seed, info.name),
            )

    def _count(self, nbytes: int) -> bool:
        with self._lock:
            fits = self._held + nbytes <= _MOST_HELD
            if fits:
                self._held += nbytes
        return fits


def _nbytes(shape: tuple[int, ...], rank: int) -> int:
    return 4 * rank * sum(shape)


def _guess(
    source: CheckpointSource, config: PissaConfig, resolved: Resolved
) -> Iterator[tuple[TensorInfo, int]]:
    """Yield what is likely a target and can be done soon, with the bytes it takes in flight."""
    simple = not (config.exclude_modules or config.rank_pattern or config.layers_to_transform)
    if resolved.device.type != "cpu" or not source.rereads or not simple:
        return
    if config.svd.method != "auto":
        return
    for info in _weights_of_layers(read_layout(source)):
        m, n = info.shape
        size = working_bytes(m, n, config.rank, TORCH_DTYPES[info.dtype].itemsize, "auto")
        soon = 4 * m * n * (config.rank + 8) * _STEPS <= _MOST_FLOPS
        wanted = _is_wanted(info.name.removesuffix(".weight"), config.target_modules)
        if wanted and soon and config.rank <= min(m, n) and size <= resolved.budget:
            yield info, size


def _weights_of_layers(layout: Layout) -> Iterator[TensorInfo]:
    for info in layout.tensors.values():
        matrix = len(info.shape) == 2 and info.dtype in TORCH_DTYPES
        if matrix and info.name.endswith(".weight") and _LAYER.search(info.name):
            yield info


def _is_wanted(module: str, targets: str | list[str]) -> bool:
    if isinstance(targets, str):
        return targets == "all-linear"
    return any(module == target or module.endswith(f".{target}") for target in targets)
