"""How long to go on when the Hub does not answer or asks to wait, and who is told meanwhile."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from pissa_core import leaving
from pissa_core.errors import PissaError

_ENOUGH_PROGRESS = 1 << 20  # bytes that make a failed transfer worth new patience


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to go on when the Hub does not answer, or asks to wait.

    Attributes:
        give_up_s: seconds without progress after which the error is raised.
        longest_pause_s: seconds of pauses that the Hub may ask for (429, Retry-After) besides.
        first_wait_s, longest_wait_s: bounds of the doubling wait between tries.
        tries: further tries that are granted however long the ones before them took.
    """

    give_up_s: float
    longest_pause_s: float
    first_wait_s: float = 1.0
    longest_wait_s: float = 15.0
    tries: int = 0


OPENING = Patience(give_up_s=12, longest_pause_s=12)
"""For the first calls: somebody is waiting, and a plan must answer within 30 s."""

TRANSFER = Patience(give_up_s=120, longest_pause_s=330, tries=2)
"""For data: the Hub's rate limits are counted over 300 s, so the next window is waited for."""

PATIENT_OPENING = replace(OPENING, longest_pause_s=TRANSFER.longest_pause_s)
"""For the first calls of a job: nobody waits, and one that finds the Hub away is tried again."""

COMMIT = Patience(give_up_s=300, longest_pause_s=3900, tries=2)
"""For commits: the Hub counts them over an hour, and they are the last step of long work."""


@dataclass(frozen=True, slots=True)
class Pause:
    """A wait that begins: what for, and how long."""

    error: PissaError
    seconds: float


Notice = Callable[[Pause | None], None]
"""Told of each pause when it begins, and None when it is over."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """One failure: our error, whether trying again may help, and a pause the Hub asked for."""

    error: PissaError
    passing: bool = False
    pause_s: float | None = None


@dataclass(slots=True)
class Waiting:
    """The waiting of one call: raises the trouble's error once patience is at an end."""

    patience: Patience
    notice: Notice | None = None
    _tries: int = 0
    _received: int = 0
    _paused_s: float = 0.0
    _since: float = field(default_factory=time.monotonic)

    def received(self, nbytes: int) -> None:
        """Note progress; enough of it renews the patience."""
        self._received += nbytes
        if self._received >= _ENOUGH_PROGRESS:
            self._tries, self._received, self._paused_s = 0, 0, 0.0
            self._since = time.monotonic()

    def after(self, trouble: Trouble) -> None:
        """Sleep before the next try, or raise."""
        wait_s = self._next_wait_s(trouble.pause_s or 0.0) if trouble.passing else None
        if wait_s is None:
            raise trouble.error
        self._tries += 1
        pause(Pause(trouble.error, wait_s), self.notice)

    def _next_wait_s(self, pause_s: float) -> float | None:
        """Seconds to wait, or None if there is no more patience."""
        wait_s = min(self.patience.first_wait_s * 2**self._tries, self.patience.longest_wait_s)
        wait_s *= random.uniform(0.75, 1.0)  # not everybody at once
        if pause_s > wait_s:
            self._paused_s += pause_s
            return pause_s if self._paused_s <= self.patience.longest_pause_s else None
        waited_s = time.monotonic() - self._since - self._paused_s
        granted = self._tries < self.patience.tries
        return wait_s if granted or waited_s + wait_s <= self.patience.give_up_s else None


def pause(wanted: Pause, notice: Notice | None) -> None:
    """Sleep, telling whoever wants to know; the work may be called off meanwhile."""
    if notice is None:
        leaving.sleep(wanted.seconds)
        return
    notice(wanted)
    try:
        leaving.sleep(wanted.seconds)
    finally:
        notice(None)
