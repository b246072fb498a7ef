"""Several iterators read as one: complete, in each one's order, and closed to the last."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest

from pissa_core import leaving
from pissa_core.lanes import in_turn, side_by_side


def numbers(name: str, count: int, closed: list[str], running: list[int] | None = None):
    if running is not None:
        running.append(1)
    try:
        for number in range(count):
            yield name, number
    finally:
        closed.append(name)
        if running is not None:
            running.pop()


@pytest.mark.parametrize("lanes", [1, 2, 5])
def test_everything_comes_in_each_one_s_order(lanes):
    closed: list[str] = []
    streams = [partial(numbers, name, 20, closed) for name in "abcd"]
    found = list(side_by_side(streams, lanes=lanes))
    assert len(found) == 80
    for name in "abcd":
        assert [number for each, number in found if each == name] == list(range(20))
    assert sorted(closed) == list("abcd")


def test_in_turn_is_one_after_another_and_closes_the_one_under_way():
    closed: list[str] = []
    streams = [partial(numbers, name, 2, closed) for name in "abc"]
    assert list(in_turn(streams)) == [(name, n) for name in "abc" for n in range(2)]
    closed.clear()
    events = in_turn(streams)
    next(events)
    events.close()
    assert closed == ["a"]


def test_no_more_run_than_there_are_lanes():
    running: list[int] = []
    most = 0
    for _ in side_by_side([partial(numbers, "x", 9, [], running) for _ in range(6)], lanes=2):
        most = max(most, len(running))
    assert most == 2


def test_who_reads_no_further_holds_up_the_work():
    made = []

    def count():
        for number in range(1000):
            made.append(number)
            yield number

    events = side_by_side([count], lanes=1)
    next(events)
    time.sleep(0.05)
    assert len(made) <= 3
    events.close()


def test_closing_closes_those_under_way_and_begins_no_more():
    closed: list[str] = []
    before = threading.active_count()
    events = side_by_side([partial(numbers, name, 10**6, closed) for name in "abcd"], lanes=2)
    for _ in range(10):
        next(events)
    events.close()
    assert sorted(closed) == ["a", "b"]
    assert threading.active_count() == before


def test_an_error_in_one_is_raised_and_ends_the_others():
    closed: list[str] = []

    def fails():
        yield "first", 0
        raise LookupError("in a lane")

    streams = [fails, partial(numbers, "b", 10**6, closed), partial(numbers, "c", 5, closed)]
    with pytest.raises(LookupError, match="in a lane"):
        list(side_by_side(streams, lanes=2))
    assert closed == ["b"]


def test_an_error_in_one_ends_another_in_its_wait():
    waits, left = threading.Event(), []

    def fails():
        waits.wait()
        yield "first", 0
        raise LookupError("in a lane")

    def sleeps():
        yield "second", 0
        waits.set()
        try:
            leaving.sleep(10**6)
        except leaving.CalledOff:
            left.append("second")
            raise

    with pytest.raises(LookupError, match="in a lane"):
        list(side_by_side([fails, sleeps], lanes=2))
    assert left == ["second"]
