"""Waits that can be left: whoever began the work may call it off while it sleeps.

Closing an iterator reaches it at its next item only, and a wait for the Hub may take an hour.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class CalledOff(Exception):
    """The work was called off while it waited."""


# Of the thread, not an argument: between those who call work off and the call to the Hub that
# waits deep inside it, nobody else has any use for it.
_stop: ContextVar[tuple[threading.Event, bool] | None] = ContextVar("stop", default=None)


@contextmanager
def leaving_on(stop: threading.Event, *, at_once: bool = False) -> Iterator[None]:
    """Have every `sleep` of this thread end when `stop` is set, while the block is open.

    Args:
        stop: set by whoever calls the work off.
        at_once: the work has lost its right to go on, so that `check` raises, too.
    """
    token = _stop.set((stop, at_once))
    try:
        yield
    finally:
        _stop.reset(token)


def sleep(seconds: float) -> None:
    """Sleep.

    Raises:
        CalledOff: as soon as the work is called off.
    """
    found = _stop.get()
    if found is None:
        time.sleep(seconds)
    elif found[0].wait(seconds):
        raise CalledOff


def check() -> None:
    """Go on, unless the right to is lost.

    Raises:
        CalledOff: if it is.
    """
    found = _stop.get()
    if found is not None and found[1] and found[0].is_set():
        raise CalledOff
