"""Where the arithmetic runs: the device, how many matrices at a time, within how many bytes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from pissa_core.errors import InvalidRequest
from pissa_core.shortage import let_go, ran_out_of_memory
from pissa_core.slots import default_budget, run_in_slots, usable_cores
from pissa_core.traffic import Traffic

Item = TypeVar("Item")
Result = TypeVar("Result")
_log = logging.getLogger(__name__)
_GPU_SLOTS = 3
_SHARE_OF_FREE = 0.8


@dataclass(frozen=True, slots=True)
class Runtime:
    """What the caller wishes; None leaves it to `resolve`.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        slots: matrices in flight.
        memory_budget: bytes that matrices in flight may take together, on a GPU of its memory.
        disk_budget: bytes of scratch that shards under way may take together.
        traffic: what this process shares with others; None: it is alone.
    """

    device: str = "auto"
    slots: int | None = None
    memory_budget: int | None = None
    disk_budget: int | None = None
    traffic: Traffic | None = None


@dataclass(frozen=True, slots=True)
class Resolved:
    """A runtime with every wish settled."""

    device: torch.device
    slots: int
    budget: int


def resolve(runtime: Runtime) -> Resolved:
    """Settle a runtime on this machine.

    On a CPU there is one slot a core, since several matrices with one BLAS thread each are done
    sooner than one matrix with many, and the bytes do not depend on the number. On a GPU, while
    one matrix is worked on, another is read or copied and a third is written; it becomes the
    calling thread's current device, and products in float32 keep all their bits from then on.

    Raises:
        InvalidRequest: if the device is not one of this machine's.
    """
    device = _device(runtime.device)
    if device.type == "cuda":
        _prepare(device)
    slots = runtime.slots or (usable_cores() if device.type == "cpu" else _GPU_SLOTS)
    return Resolved(device, slots, _budget(runtime.memory_budget, device))


def _budget(wished: int | None, device: torch.device) -> int:
    if device.type == "cpu":
        return default_budget() if wished is None else wished
    # The rest is for what the allocator rounds up and what cuBLAS and cuSOLVER take.
    room = int(torch.cuda.mem_get_info(device)[0] * _SHARE_OF_FREE)
    return room if wished is None else min(wished, room)


@contextmanager
def computing(runtime: Runtime) -> Iterator[Resolved]:
    """Settle a runtime, and at the end let the next process have this one's memory of a GPU.

    Raises:
        InvalidRequest: as `resolve`.
    """
    resolved = resolve(runtime)
    try:
        yield resolved
    except BaseException as error:
        if resolved.device.type == "cuda":
            let_go(error)  # its frames hold tensors
        raise
    finally:
        if resolved.device.type == "cuda":
            torch.cuda.empty_cache()


def compute(
    resolved: Resolved,
    work: Callable[[Item, torch.device], Result],
    sized: Iterable[tuple[Item, int]],
    *,
    name: Callable[[Item], str],
    begins: Callable[[Item, int], None] | None = None,
) -> Generator[Result]:
    """Yield `work(item, device)` for each item, as each is done, within a runtime's limits.

    Where memory runs out there is one slot less from then on; what is too large for a GPU even
    alone is done on the CPU.

    Args:
        resolved: the device, the slots and the budget.
        work: what to do with an item.
        sized: pairs of item and the bytes of the device's memory that it needs.
        name: of an item, for the log.
        begins: as of `run_in_slots`.
    """

    def on_the_device(item: Item) -> Result:
        return work(item, resolved.device)

    def on_the_cpu(item: Item) -> Result:
        _log.warning("%s does not fit %s; it is done on the CPU", name(item), resolved.device)
        return work(item, torch.device("cpu"))

    yield from run_in_slots(
        on_the_device,
        sized,
        slots=resolved.slots,
        budget=resolved.budget,
        ran_out=ran_out_of_memory,
        last_resort=None if resolved.device.type == "cpu" else on_the_cpu,
        begins=begins,
    )


def _prepare(device: torch.device) -> None:
    # What asks for no device, as `empty_cache`, would else take half a gigabyte of the first GPU.
    torch.cuda.set_device(device)
    # Certificates rest on products in float32. Some images have TF32 stand for it, which keeps 10
    # bits of 23.
    torch.set_float32_matmul_precision("highest")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidRequest(
            f"{name!r} is not a device", hint="use auto, cpu, cuda or cuda:N"
        ) from error
    present = torch.cuda.device_count() if device.type == "cuda" else int(device.type == "cpu")
    if (device.index or 0) >= present:
        raise InvalidRequest(
            f"there is no device {name!r} here; torch sees {torch.cuda.device_count()} GPUs",
            hint="use cpu, or auto to take what there is",
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device
