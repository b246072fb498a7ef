"""Several matrices in flight under a budget of bytes, one thread and one BLAS thread each."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import psutil
import torch

from pissa_core.cgroups import ROOT, cores_allowed, memory_left

Item = TypeVar("Item")
Result = TypeVar("Result")
_log = logging.getLogger(__name__)


def usable_cores(root: Path = ROOT) -> int:
    """CPU cores this process may run on, a container's share of them rounded up."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    allowed = cores_allowed(root)
    return cores if allowed is None else max(1, min(cores, math.ceil(allowed)))


def default_budget(root: Path = ROOT) -> int:
    """Half of the memory that is available now, in bytes: the machine's, or the container's."""
    free, left = int(psutil.virtual_memory().available), memory_left(root)
    return (free if left is None else min(free, left)) // 2


@dataclass(slots=True)
class _Flight(Generic[Item]):
    """An item in flight; `crowded` once another was in flight beside it."""

    item: Item
    size: int
    crowded: bool = False


def run_in_slots(
    work: Callable[[Item], Result],
    items: Iterable[tuple[Item, int]],
    *,
    slots: int,
    budget: int,
    ran_out: Callable[[BaseException], bool] | None = None,
    last_resort: Callable[[Item], Result] | None = None,
    begins: Callable[[Item, int], None] | None = None,
) -> Iterator[Result]:
    """Yield `work(item)` for each item, as each is done.

    Items are begun in the order given. At most `slots` are in flight and their sizes sum to at
    most `budget` bytes; an item larger than the budget runs alone. Closing the iterator, or an
    error in one item, begins nothing more and waits for what is in flight.

    Where memory runs out for an item that was not alone, there is one slot less from then on and
    the item is begun again; for one that was alone, `last_resort` is asked, if there is one.

    Args:
        work: called in a thread whose torch uses one intra-op thread.
        items: pairs of item and the bytes it needs while in flight.
        slots: most items in flight.
        budget: most bytes in flight.
        ran_out: whether an error says that there was too little memory; it may free some.
        last_resort: another way to do an item, which needs other memory.
        begins: told of each item before its turn, and of the bytes in flight with it.
    """
    waiting = list(items)[::-1]
    running: dict[Future[Result], _Flight[Item]] = {}
    pool = ThreadPoolExecutor(slots, "matrix", initializer=torch.set_num_threads, initargs=(1,))
    try:
        while waiting or running:
            while waiting and _fits(waiting[-1][1], running.values(), slots, budget):
                flight = _Flight(*waiting.pop())
                if begins is not None:
                    in_flight = flight.size + sum(other.size for other in running.values())
                    begins(flight.item, in_flight)
                running[pool.submit(work, flight.item)] = flight
            for flight in running.values():
                flight.crowded |= len(running) > 1
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            while finished:
                future = finished.pop()
                flight = running.pop(future)
                alone = not flight.crowded and last_resort is None
                if alone or not _is_short(future, ran_out):
                    yield future.result()
                    continue
                del future  # and its error, or what that holds lies about while the item runs again
                if flight.crowded:
                    slots = _one_less(slots)
                    waiting.append((flight.item, flight.size))
                elif last_resort is not None:
                    yield pool.submit(last_resort, flight.item).result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _is_short(future: Future[Result], ran_out: Callable[[BaseException], bool] | None) -> bool:
    error = future.exception()
    return error is not None and ran_out is not None and ran_out(error)


def _one_less(slots: int) -> int:
    fewer = max(1, slots - 1)
    _log.warning("memory ran out with up to %d matrices in flight; going on with %d", slots, fewer)
    return fewer


def _fits(size: int, running: Collection[_Flight[Item]], slots: int, budget: int) -> bool:
    if not running:
        return True
    return len(running) < slots and sum(flight.size for flight in running) + size <= budget
