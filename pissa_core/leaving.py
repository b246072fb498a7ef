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
_stop: ContextVar[threading.Event | None] = ContextVar("stop", default=None)


@contextmanager
def leaving_on(stop: threading.Event) -> Iterator[None]:
    """Have every `sleep` of this thread end when `stop` is set, while the block is open."""
    token = _stop.set(stop)
    try:
        yield
    finally:
        _stop.reset(token)


def sleep(seconds: float) -> None:
    """Sleep.

    Raises:
        CalledOff: as soon as the work is called off.
    """
    stop = _stop.get()
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise CalledOff
