"""How often to commit: the Hub counts commits over an hour, and refuses more for the rest of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta


@dataclass(frozen=True, slots=True)
class Pace:
    """How many commits a repo is to see.

    Attributes:
        most: in any window; the Hub has been seen to refuse from 128 an hour on.
        at_once: of them, made without a wait; the others are spread over the window.
        window: how far back commits are counted.
    """

    most: int = 100
    at_once: int = 50
    window: timedelta = timedelta(hours=1)

    def wait_s(self, times: Sequence[datetime], now: datetime) -> float:
        """Return how long to wait before the next commit.

        What is left of `most` is spread evenly over what is left of the window, counted from the
        oldest commit in it: commits that wait carry more seals each, and nobody waits long.

        Args:
            times: when each commit was made, newest first.
            now: the time.
        """
        recent = [at for at in times if now - at < self.window]
        if len(recent) < self.at_once:
            return 0.0
        left = self.most - len(recent)
        if left <= 0:
            due = recent[self.most - 1] + self.window
        else:
            due = recent[0] + (recent[-1] + self.window - recent[0]) / (left + 1)
        return max(0.0, (due - now).total_seconds())
