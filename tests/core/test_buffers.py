"""Memory that is lent again and again: to one at a time, and no more than is said is kept."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest

from pissa_core.buffers import Buffers


def lend(buffers: Buffers, *sizes: int) -> list[int]:
    """Lend several at once; return where they lay."""
    with ExitStack() as at_once:
        lent = [at_once.enter_context(buffers.taken(nbytes)) for nbytes in sizes]
        assert all(len(one) >= nbytes for one, nbytes in zip(lent, sizes, strict=True))
        assert all(one.data_ptr() % 64 == 0 for one in lent)
        return [one.data_ptr() for one in lent]


def test_what_was_given_back_is_lent_again_and_what_is_lent_is_not() -> None:
    buffers = Buffers(spare=1000)
    (first,) = lend(buffers, 1000)
    assert lend(buffers, 900) == [first]
    two = lend(buffers, 1000, 1000)
    assert first in two
    assert len(set(two)) == 2


@pytest.mark.parametrize("spare", [0, 500, 1500, 5000])
def test_no_more_is_held_than_is_asked_for_and_may_be_spared(spare: int) -> None:
    buffers = Buffers(spare)
    lend(buffers, 1000, 2000, 3000)
    for nbytes in (100, 700, 1000, 2500, 4000, 10):
        with buffers.taken(nbytes) as buffer:
            assert len(buffer) - nbytes + sum(map(len, buffers._free)) <= spare
    assert buffers._unused == 0


def test_what_is_expected_may_find_its_memory_kept() -> None:
    buffers = Buffers(spare=2000)
    lend(buffers, 1000, 1000)
    for _ in range(2):
        buffers.expect(1000, spare=0)
    with buffers.taken(1000):
        assert len(buffers._free) == 1
        with buffers.taken(1000):
            assert buffers._free == []
    buffers.expect(1, spare=0)
    with buffers.taken(1):
        assert buffers._free == []


def test_what_an_error_ends_is_not_kept_and_what_is_free_can_be_let_go() -> None:
    buffers = Buffers(spare=5000)
    with pytest.raises(MemoryError), buffers.taken(1000):
        raise MemoryError
    assert (buffers._free, buffers._unused) == ([], 0)
    lend(buffers, 1000, 1000)
    buffers.clear()
    assert buffers._free == []
    with buffers.taken(1000):
        buffers.close()
    assert buffers._free == []


def test_threads_never_hold_the_same_memory() -> None:
    buffers, wrong = Buffers(spare=8 * 4096), []

    def work(mark: int) -> None:
        for _ in range(300):
            with buffers.taken(4096) as buffer:
                buffer[:4096].fill_(mark)
                if not bool((buffer[:4096] == mark).all()):
                    wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(buffers._free) <= 8
