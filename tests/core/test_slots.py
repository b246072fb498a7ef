"""Items in flight: bounded in number and bytes, stopped cleanly."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from pissa_core.errors import InvalidRequest
from pissa_core.runtime import Runtime, resolve
from pissa_core.slots import run_in_slots


class Watched:
    """Work that notes how much of it is in flight at once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.now: list[int] = []
        self.most_items = self.most_bytes = 0
        self.begun: list[int] = []

    def __call__(self, size: int) -> int:
        with self.lock:
            self.begun.append(size)
            self.now.append(size)
            self.most_items = max(self.most_items, len(self.now))
            self.most_bytes = max(self.most_bytes, sum(self.now))
        time.sleep(0.002)
        with self.lock:
            self.now.remove(size)
        return size


@pytest.mark.parametrize(("slots", "budget"), [(1, 100), (3, 100), (4, 7)])
def test_never_more_in_flight_than_slots_and_budget(slots, budget):
    work = Watched()
    sizes = [3, 4, 2, 1, 5, 2, 2, 1, 3]
    done = list(run_in_slots(work, [(s, s) for s in sizes], slots=slots, budget=budget))
    assert sorted(done) == sorted(sizes)
    assert work.begun == sizes
    assert work.most_items <= slots
    assert work.most_bytes <= budget


def test_an_oversized_item_runs_alone():
    work = Watched()
    list(run_in_slots(work, [(s, s) for s in [2, 50, 2]], slots=4, budget=10))
    assert work.most_bytes == 50


def test_an_error_begins_nothing_more():
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 1:
            raise ZeroDivisionError("at item 1")
        return item

    with pytest.raises(ZeroDivisionError, match="at item 1"):
        list(run_in_slots(work, [(i, 1) for i in range(100)], slots=1, budget=10))
    assert begun == [0, 1]


def test_closing_begins_nothing_more_and_waits_for_what_runs():
    work = Watched()
    running = run_in_slots(work, [(1, 1)] * 100, slots=2, budget=10)
    next(running)
    running.close()
    assert work.now == []
    assert len(work.begun) < 10


def test_each_slot_has_one_blas_thread():
    threads = run_in_slots(lambda _: torch.get_num_threads(), [(0, 0)] * 4, slots=2, budget=1)
    assert set(threads) == {1}


@pytest.mark.parametrize("device", ["tpu-v9", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(InvalidRequest, match=device):
        resolve(Runtime(device=device))


def test_what_is_given_is_kept():
    resolved = resolve(Runtime(device="cpu", slots=3, memory_budget=12345))
    assert (resolved.device.type, resolved.slots, resolved.budget) == ("cpu", 3, 12345)
