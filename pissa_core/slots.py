"""Several matrices in flight under a budget of bytes, one thread and one BLAS thread each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

import psutil
import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def usable_cores() -> int:
    """CPU cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_budget() -> int:
    """Half of the memory that is available now, in bytes."""
    return int(psutil.virtual_memory().available) // 2


def run_in_slots(
    work: Callable[[Item], Result],
    items: Iterable[tuple[Item, int]],
    *,
    slots: int,
    budget: int,
) -> Iterator[Result]:
    """Yield `work(item)` for each item, as each is done.

    Items are begun in the order given. At most `slots` are in flight and their sizes sum to at
    most `budget` bytes; an item larger than the budget runs alone. Closing the iterator, or an
    error in one item, begins nothing more and waits for what is in flight.

    Args:
        work: called in a thread whose torch uses one intra-op thread.
        items: pairs of item and the bytes it needs while in flight.
        slots: most items in flight.
        budget: most bytes in flight.
    """
    waiting = list(items)[::-1]
    running: dict[Future[Result], int] = {}
    pool = ThreadPoolExecutor(slots, "matrix", initializer=torch.set_num_threads, initargs=(1,))
    try:
        while waiting or running:
            while waiting and _fits(waiting[-1][1], running, slots, budget):
                item, size = waiting.pop()
                running[pool.submit(work, item)] = size
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                del running[future]
                yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _fits(size: int, running: dict[Future[Result], int], slots: int, budget: int) -> bool:
    if not running:
        return True
    return len(running) < slots and sum(running.values()) + size <= budget
