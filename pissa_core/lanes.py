"""Several iterators run side by side, in a thread each, and read as one."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from pissa_core.leaving import leaving_on

T = TypeVar("T")

_LOOK_UP_S = 0.1


@dataclass(frozen=True, slots=True)
class _Ended:
    """A lane has no more to do, or failed."""

    error: BaseException | None = None


class _Lanes(Generic[T]):
    def __init__(self, streams: Iterable[Callable[[], Generator[T]]]) -> None:
        self._waiting = deque(streams)
        # One place: whoever reads no further holds up the work, as with a single iterator.
        self.events: queue.Queue[T | _Ended] = queue.Queue(1)
        self.stopping = threading.Event()

    def run(self) -> None:
        """Do what is waiting, one after another; be one lane."""
        try:
            with leaving_on(self.stopping):
                while not self.stopping.is_set() and (begin := self._next()) is not None:
                    self._follow(begin)
        except BaseException as error:  # noqa: BLE001 - raised again by whoever reads
            self._put(_Ended(error))
        else:
            self._put(_Ended())

    def _next(self) -> Callable[[], Generator[T]] | None:
        with suppress(IndexError):
            return self._waiting.popleft()
        return None

    def _follow(self, begin: Callable[[], Generator[T]]) -> None:
        with closing(begin()) as stream:
            for event in stream:
                if not self._put(event):
                    return

    def _put(self, event: T | _Ended) -> bool:
        while not self.stopping.is_set():
            try:
                self.events.put(event, timeout=_LOOK_UP_S)
            except queue.Full:
                continue
            return True
        return False


def in_turn(streams: Iterable[Callable[[], Generator[T]]]) -> Iterator[T]:
    """Yield what several iterators yield, one after another, in this thread."""
    for begin in streams:
        yield from begin()


def side_by_side(streams: Iterable[Callable[[], Generator[T]]], *, lanes: int) -> Iterator[T]:
    """Yield what several iterators yield, as it comes; at most `lanes` of them run at a time.

    They are begun in the order given. Closing this iterator, or an error in one of them, begins no
    more and closes those under way, each at its next item, or in the wait (`leaving`) it is in.
    """
    work = _Lanes(streams)
    threads = [threading.Thread(target=work.run, name=f"lane-{i}") for i in range(lanes)]
    for thread in threads:
        thread.start()
    try:
        running = lanes
        while running:
            event = work.events.get()
            if not isinstance(event, _Ended):
                yield event
            elif event.error is not None:
                raise event.error
            else:
                running -= 1
    finally:
        work.stopping.set()
        for thread in threads:
            thread.join()
