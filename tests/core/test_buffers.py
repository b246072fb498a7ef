"""Memory that is lent again and again: to one at a time, and no more of it than is in use."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import torch

from pissa_core.buffers import Buffers


def address(buffers: Buffers, nbytes: int) -> int:
    with buffers.taken(nbytes) as buffer:
        assert len(buffer) >= nbytes
        assert buffer.data_ptr() % 64 == 0
        return buffer.data_ptr()


def test_what_was_given_back_is_lent_again_and_what_is_lent_is_not() -> None:
    buffers = Buffers()
    first = address(buffers, 1000)
    assert address(buffers, 900) == first
    with buffers.taken(1000) as one, buffers.taken(1000) as other:
        assert {one.data_ptr(), other.data_ptr()} >= {first}
        assert one.data_ptr() != other.data_ptr()


def test_what_does_not_fit_the_next_one_goes() -> None:
    buffers = Buffers()
    with ExitStack() as at_once:
        for _ in range(3):
            at_once.enter_context(buffers.taken(1000))
    assert len(buffers._free) == 3
    with buffers.taken(100_000):
        assert buffers._free == []
    with buffers.taken(1000) as buffer:
        assert len(buffer) == 1000
        assert buffers._free == []


def test_threads_never_hold_the_same_memory() -> None:
    buffers, wrong = Buffers(), []

    def work(mark: int) -> None:
        for _ in range(300):
            with buffers.taken(4096) as buffer:
                buffer[:4096].fill_(mark)
                if not torch.all(buffer[:4096] == mark):
                    wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(buffers._free) <= 8
