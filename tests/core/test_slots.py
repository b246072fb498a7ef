"""Items in flight: bounded in number and bytes, stopped cleanly."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import weakref

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


class Room:
    """Work that finds memory short whenever more than so many are in flight."""

    def __init__(self, room: int) -> None:
        self.room, self.lock = room, threading.Lock()
        self.now = 0
        self.failures = 0

    def __call__(self, item: int) -> int:
        with self.lock:
            self.now += 1
            short = self.now > self.room
            self.failures += short
        time.sleep(0.005)
        with self.lock:
            self.now -= 1
        if short:
            raise MemoryError
        return item


def is_memory_error(error: BaseException) -> bool:
    return isinstance(error, MemoryError)


@pytest.mark.parametrize("room", [1, 2, 3])
def test_where_memory_runs_out_slots_are_given_up_and_every_item_is_done(room, caplog):
    work = Room(room)
    items = [(n, 1) for n in range(20)]
    done = list(run_in_slots(work, items, slots=4, budget=99, ran_out=is_memory_error))
    assert sorted(done) == list(range(20))
    assert 1 <= work.failures <= 4
    assert "going on with 3" in caplog.text


def test_an_item_that_does_not_fit_alone_goes_the_other_way_or_ends_it():
    items = [(n, 1) for n in range(6)]
    options = {"slots": 2, "budget": 9, "ran_out": is_memory_error}
    done = list(run_in_slots(Room(0), items, last_resort=lambda n: -n, **options))
    assert sorted(done) == [-5, -4, -3, -2, -1, 0]
    with pytest.raises(MemoryError):
        list(run_in_slots(Room(0), items, **options))


def test_what_errors_held_is_gone_when_their_items_are_begun_again():
    both, held = threading.Barrier(2, timeout=30), []

    def work(item: int) -> int:
        if len(held) == 2:
            until = time.monotonic() + 5  # the thread of the other error may not have let go yet
            while any(each() for each in held) and time.monotonic() < until:
                time.sleep(0.001)
            return sum(each() is not None for each in held)
        matrix = torch.ones(1)

        def fail() -> None:
            both.wait()
            raise MemoryError(matrix.shape)  # a closure's variables outlive `clear_frames`

        held.append(weakref.ref(matrix))
        fail()
        return 0

    options = {"slots": 2, "budget": 9, "ran_out": is_memory_error}
    assert list(run_in_slots(work, [(1, 1), (2, 1)], **options)) == [0, 0]


def test_another_error_is_not_taken_for_want_of_memory():
    def work(item: int) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(run_in_slots(work, [(1, 1)], slots=2, budget=9, ran_out=is_memory_error))


SHORT_OF_MEMORY = """
import resource, threading
import torch
from pissa_core.shortage import ran_out_of_memory
from pissa_core.slots import run_in_slots

short = threading.Event()

def work(n):
    try:
        held = torch.ones(n, 64 << 20)  # 256 MB of float32 a row
    except RuntimeError:
        short.set()
        raise
    short.wait(60)  # hold on to it until there was too little for another
    return n

list(run_in_slots(lambda n: n, [(n, 1) for n in range(4)], slots=4, budget=9))
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (800 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(sorted(run_in_slots(work, [(1, 1)] * 6, slots=4, budget=9, ran_out=ran_out_of_memory)))
try:
    list(run_in_slots(work, [(9, 1)], slots=4, budget=9, ran_out=ran_out_of_memory))
except RuntimeError as error:
    print("can't allocate memory" in str(error))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_an_allocation_that_the_kernel_refuses_lowers_the_slots():
    ended = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY], capture_output=True, text=True, check=True
    )
    assert ended.stdout.split("\n")[:2] == ["[1, 1, 1, 1, 1, 1]", "True"]
    assert "memory ran out" in ended.stderr
