"""How much one key may ask for: requests a minute, and event streams at a time.

Counted in this process: with several API processes behind one address each allows as much. How
many jobs a key may have waiting is the store's to count, for all of them.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import TypeVar
from weakref import WeakSet

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from app.errors import TooManyRequests
from worker.settings import Settings

WRONG_KEYS_A_MINUTE = 60
"""How often one address may bring a wrong key, or none, before it is told to wait."""

_Item = TypeVar("_Item")


class Limits:
    """Counts what each owner asks for; an owner is a key, or this machine where there are none."""

    def __init__(self, settings: Settings) -> None:
        """Take the operator's numbers."""
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._requests = _a_minute(settings.max_requests_per_minute)
        self._wrong_keys = RateLimitItemPerMinute(WRONG_KEYS_A_MINUTE)
        self._max_streams = settings.max_streams
        self._streams: dict[str, WeakSet[AsyncIterator[object]]] = defaultdict(WeakSet)

    def count_request(self, owner: str) -> None:
        """Count one request of `owner`.

        Raises:
            TooManyRequests: if it is one too many within a minute.
        """
        if self._requests is not None:
            self._count(self._requests, "request", owner, "follow events instead of polling")

    def count_wrong_key(self, address: str) -> None:
        """Count one refusal for want of a key; a right key from the same address is not held up.

        Raises:
            TooManyRequests: if it is one too many within a minute.
        """
        self._count(self._wrong_keys, "wrong API key", address, None)

    def stream(self, owner: str, events: AsyncIterator[_Item]) -> AsyncIterator[_Item]:
        """Return `events`, which counts for as long as anything holds on to it.

        Raises:
            TooManyRequests: if `owner` has as many open as it may.
        """
        # Weak references: a client that leaves before its stream begins leaves nothing to count.
        streams = self._streams[owner]
        if len(streams) >= self._max_streams:
            raise TooManyRequests(
                f"{len(streams)} event streams are open, as many as one key may have",
                hint="close some, or poll the job instead",
            )
        streams.add(events)
        return events

    def let_go(self, owner: str, events: AsyncIterator[object]) -> None:
        """Count `events` no more: nobody reads them, whatever still holds on to them."""
        self._streams[owner].discard(events)

    def _count(self, limit: RateLimitItemPerMinute, what: str, who: str, hint: str | None) -> None:
        if self._limiter.hit(limit, what, who):
            return
        reset = self._limiter.get_window_stats(limit, what, who).reset_time
        raise TooManyRequests(
            f"more than {limit.amount} times within a minute: {what}",
            hint=hint,
            retry_after_s=max(1, math.ceil(reset - time.time())),
        )


def _a_minute(count: int) -> RateLimitItemPerMinute | None:
    return RateLimitItemPerMinute(count) if count else None
