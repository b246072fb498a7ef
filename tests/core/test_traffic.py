"""Who goes next: one downloads, one computes, and whoever waits can be called off."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from conversions import convert_to, course_of
from lora_tools import to_lora_course

from pissa_core.adapters.ledger import Ledger
from pissa_core.events import MatrixDone, Waiting
from pissa_core.traffic import FileGate, Leave, ThreadGate, Traffic

INSIDE = """
import sys, time
from pathlib import Path
from pissa_core.traffic import FileGate

assert FileGate(Path(sys.argv[1])).enter(0)
print("inside", flush=True)
time.sleep(600)
"""


@pytest.fixture(params=["threads", "processes"])
def traffic(request: pytest.FixtureRequest, tmp_path: Path) -> Traffic:
    ledger = Ledger(tmp_path / "ledger", 100)
    if request.param == "threads":
        return Traffic(ThreadGate(), ThreadGate(), ledger)
    return Traffic(FileGate(tmp_path / "line"), FileGate(tmp_path / "device"), ledger)


def test_one_at_a_time_downloads_and_one_computes(traffic):
    with traffic.passage("a") as first, traffic.passage("b") as second:
        assert list(first.to_line()) == []
        waiting = second.to_line()
        assert next(waiting) == Waiting("b")
        assert list(first.to_device()) == []  # and so the line is free
        assert list(waiting) == []
        waiting = second.to_device()
        assert next(waiting) == Waiting("b")
        first.computed()
        assert list(waiting) == []


def test_the_next_download_waits_for_one_that_waits_for_the_device(traffic):
    with (
        traffic.passage("a") as first,
        traffic.passage("b") as second,
        traffic.passage("c") as third,
    ):
        assert list(first.to_line()) + list(first.to_device()) == []
        assert list(second.to_line()) == []
        assert next(second.to_device()) == Waiting("b")
        assert next(third.to_line()) == Waiting("c")


def test_what_is_held_is_given_back_however_it_ends(traffic):
    def interrupted() -> None:
        with traffic.passage("a") as first:
            for _ in (*first.to_disk(80, None), *first.to_line(), *first.to_device()):
                pass
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with traffic.passage("b") as second:
        assert list(second.to_disk(100, None)) == []
        assert list(second.to_line()) + list(second.to_device()) == []


def test_room_on_the_disk_is_waited_for(traffic):
    with traffic.passage("b") as second:
        with traffic.passage("a") as first:
            assert list(first.to_disk(60, None)) == []
            waiting = second.to_disk(50, None)
            assert next(waiting) == Waiting("b")
        assert list(waiting) == []


def test_one_that_is_killed_inside_leaves_the_gate_open(tmp_path):
    command = [sys.executable, "-c", INSIDE, str(tmp_path / "gate")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "inside\n"
        gate = FileGate(tmp_path / "gate")
        assert gate.enter(0.05) is None
        process.kill()
        process.wait()
    leave = gate.enter(5)
    assert leave is not None
    leave()


def test_without_anybody_to_share_with_nobody_waits():
    with Traffic().passage("a") as way:
        assert list(way.to_disk(10**18, None)) + list(way.to_line()) + list(way.to_device()) == []


@pytest.mark.parametrize("work", ["convert", "to-lora"])
def test_the_next_may_compute_only_once_nothing_of_a_cancelled_one_does(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    inside, left_with = Watched(), []

    class Gate:
        def enter(self, timeout_s: float) -> Leave:
            return lambda: left_with.append(inside.now)

    runtime = {"slots": 4, "traffic": Traffic(None, Gate())}
    if work == "convert":
        inside.watch(monkeypatch, "pissa_core.decompose.split_principal")
        course = course_of(llama, tmp_path / "out", {"rank": 4}, **runtime)
    else:
        convert_to(llama, tmp_path / "pair", {"rank": 4})
        inside.watch(monkeypatch, "pissa_core.lora.conversion.convert_update")
        course = to_lora_course(tmp_path / "pair/pissa_init", tmp_path / "out", **runtime)
    with closing(course):
        next(event for event in course if isinstance(event, MatrixDone))
    assert inside.company.is_set()
    assert left_with == [0]


class Watched:
    """Counts how many threads are in a function; the first waits for company."""

    def __init__(self) -> None:
        self.now, self.company = 0, threading.Event()
        self._lock = threading.Lock()

    def watch(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        module, _, function = name.rpartition(".")
        real = getattr(importlib.import_module(module), function)

        def slowly(*args: object, **options: object) -> object:
            with self._lock:
                self.now += 1
                first = self.now == 1
            try:
                # So that one is done while another is at it, for a while yet.
                if first:
                    self.company.wait(30)
                else:
                    self.company.set()
                    time.sleep(0.3)
                return real(*args, **options)
            finally:
                with self._lock:
                    self.now -= 1

        monkeypatch.setattr(name, slowly)
