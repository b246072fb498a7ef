"""How far the work is: a live bar on a terminal, plain lines in a pipe; always on stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from app.cli.units import duration, size
from worker.terms import is_telling

if TYPE_CHECKING:
    from rich.progress import TaskID

LINE_EVERY_S = 2.0
"""In a pipe, how long to stay silent while nothing but numbers change."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How far the work is at one moment; totals are 0 until they are known.

    Attributes:
        label: what is going on, ``shards``.
        noun: what `done` and `total` count, ``matrices``.
        rate: bytes a second, None while unknown.
    """

    label: str
    noun: str = ""
    done: int = 0
    total: int = 0
    nbytes: int = 0
    total_nbytes: int = 0
    rate: float | None = None
    left_s: float | None = None

    @property
    def complete(self) -> bool:
        """Whether all that is counted is done."""
        return bool(self.total) and self.done == self.total

    def figures(self) -> str:
        """Say counts, bytes, rate and time left, as far as they are known."""
        parts = []
        if self.total:
            parts.append(f"{self.done}/{self.total} {self.noun}")
        if self.total_nbytes:
            parts.append(f"{size(self.nbytes)} of {size(self.total_nbytes)}")
        if self.rate:
            parts.append(f"{size(self.rate)}/s")
        if self.left_s is not None:
            parts.append(f"{duration(self.left_s)} left")
        return ", ".join(parts)


def pause_line(seconds: float, reason: str) -> str:
    """Say that nothing goes on, for how long, and why.

    >>> pause_line(30, "the Hub takes no more requests"), pause_line(0, "the worker died")
    ('waiting 30 s: the Hub takes no more requests', 'waiting: the worker died')
    """
    return f"waiting {duration(seconds)}: {reason}" if seconds >= 1 else f"waiting: {reason}"


@dataclass(slots=True)
class Pace:
    """Rate and time left, from bytes done here and now; what an earlier run did is no speed."""

    clock: Callable[[], float] = time.monotonic
    _since: float = field(init=False)
    _fresh: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._since = self.clock()

    def add(self, nbytes: int) -> None:
        """Count bytes that were done just now."""
        self._fresh += nbytes

    def rate(self) -> float | None:
        """Return bytes a second since the start; None before the first byte."""
        seconds = self.clock() - self._since
        return self._fresh / seconds if self._fresh and seconds > 0 else None

    def left_s(self, remaining: int) -> float | None:
        """Return the seconds that `remaining` bytes will take, once there is a pace to go by."""
        rate = self.rate()
        if not rate or not is_telling(self._fresh, remaining, self.clock() - self._since):
            return None
        return remaining / rate


class Display(Protocol):
    """Where snapshots and notes are shown."""

    def show(self, snapshot: Snapshot) -> None:
        """Show how far the work is."""

    def note(self, text: str) -> None:
        """Leave a line that stays."""


@contextmanager
def display() -> Iterator[Display]:
    """Open the display that suits stderr, and take the bar down at the end."""
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with _live_bar() as bar:
            yield bar
    else:
        yield PlainLines()


@dataclass(slots=True)
class PlainLines:
    """One line whenever the phase changes, and every few seconds while it does not."""

    clock: Callable[[], float] = time.monotonic
    _last: Snapshot | None = None
    _due: float = 0.0

    def show(self, snapshot: Snapshot) -> None:
        """Print the snapshot if it is of a new phase or the end of one, or if it is time."""
        last, now = self._last, self.clock()
        news = last is None or last.label != snapshot.label or last.complete != snapshot.complete
        if snapshot == last or not (news or now >= self._due):
            return
        self._last, self._due = snapshot, now + LINE_EVERY_S
        figures = snapshot.figures()
        self.note(f"{snapshot.label}: {figures}" if figures else snapshot.label)

    def note(self, text: str) -> None:
        """Print a line."""
        print(text, file=sys.stderr, flush=True)


@contextmanager
def _live_bar() -> Iterator[Display]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[figures]}"),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
    )
    with progress:
        yield _LiveBar(progress, progress.add_task("starting", total=None, figures=""))


class _LiveBar:
    def __init__(self, progress: object, task: TaskID) -> None:
        from rich.progress import Progress

        assert isinstance(progress, Progress)
        self._progress, self._task = progress, task

    def show(self, snapshot: Snapshot) -> None:
        done, total = snapshot.nbytes, snapshot.total_nbytes
        if not total:
            done, total = snapshot.done, snapshot.total
        self._progress.update(
            self._task,
            description=snapshot.label,
            completed=done,
            total=total or None,
            figures=snapshot.figures(),
        )

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)
