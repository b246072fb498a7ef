"""The process that plans, begun before the command has been read.

It imports torch in that time, on a core that has nothing else to do: a fifth of a second that
nobody waits for later. So nothing here imports more than the standard library.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

_ahead: list[Child] = []


@dataclass(frozen=True, slots=True)
class Child:
    """A process of `app.planning`, which waits for its question, and what it says besides."""

    process: subprocess.Popen[bytes]
    log: IO[bytes]

    def end(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        with self.process:  # waits, and closes the pipes
            self.log.close()


def begin(*, debug: bool) -> Child:
    """Start one; `debug` shows what libraries say in it."""
    log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the child
    # A process group of its own: Ctrl-C is for the parent, which then ends the child. -P: no
    # module comes from the current folder, which may be a stranger's checkpoint.
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "app.planning"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if debug else log,
        bufsize=0,  # so that nothing is left to be written to a child that is gone
        process_group=0,
    )
    return Child(process, log)


@contextmanager
def begun_ahead(*, debug: bool) -> Iterator[None]:
    """Have one begun for whoever asks within the block; if nobody does, it ends with it."""
    _ahead.append(begin(debug=debug))
    try:
        yield
    finally:
        while _ahead:
            _ahead.pop().end()


@contextmanager
def child(*, debug: bool) -> Iterator[Child]:
    """Lend the one that was begun ahead, or a new one; it ends with the block."""
    own = _ahead.pop() if _ahead else begin(debug=debug)
    try:
        yield own
    finally:
        own.end()
