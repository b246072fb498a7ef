"""Where memory runs out: which errors say so, and what they still hold."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from pissa_core.errors import OutOfMemory

# Only for tensors on a GPU there is a class, torch.OutOfMemoryError. For memory of the CPU,
# page-locked memory and what cuBLAS and cuSOLVER take for a thread's handle it is a plain
# RuntimeError (pytorch/pytorch#128601).
_SAYINGS = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling",  # what cublasCreate says of it for the most part
    "CUSOLVER_STATUS_ALLOC_FAILED",
)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says so; if it does, what its frames still held is let go."""
    kinds = (OutOfMemory, MemoryError, torch.OutOfMemoryError)
    if not isinstance(error, kinds) and not any(saying in str(error) for saying in _SAYINGS):
        return False
    if isinstance(error, OutOfMemory):  # the thread has left the frames below
        let_go(error)
    return True


def let_go(error: BaseException) -> None:
    """Let go of what the frames of an error, and of those before it, still hold."""
    before: BaseException | None = error
    while before is not None:
        traceback.clear_frames(before.__traceback__)
        before = before.__cause__ or before.__context__
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


@contextmanager
def named(what: str, device: torch.device, needed: Callable[[], int]) -> Iterator[None]:
    """Name what was worked on where memory runs out.

    Args:
        what: the name, and the shape.
        device: whose memory it is.
        needed: asked for the bytes that the work takes.

    Raises:
        OutOfMemory: instead of the many errors that say so.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        where = "memory" if device.type == "cpu" else f"memory of {device}"
        raise OutOfMemory(
            f"{where} ran out at {what}, which needs about {needed():,} bytes",
            hint="use fewer slots or a smaller memory budget, or a machine with more memory",
        ) from error
