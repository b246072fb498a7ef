"""A thread that goes round while a block is open."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from types import TracebackType

from worker.errors import StoreUnavailable

_FAREWELL_S = 5.0
logger = logging.getLogger(__name__)


class Rounds(ABC):
    """Calls `round` again and again, in a thread of its own, while the block is open.

    A round that fails, or finds the store away, is logged, and the next one comes in time.
    """

    def __init__(self, name: str, *, pause_s: float) -> None:
        """Prepare; the block begins the rounds, the first of them after a pause."""
        self._name = name
        self._pause_s = pause_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> None:
        """Begin the rounds."""
        self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the rounds; one that runs is waited for, within reason."""
        self._stopping.set()
        self._thread.join(timeout=_FAREWELL_S)

    @abstractmethod
    def round(self) -> object:
        """Go round once; may raise."""

    def _run(self) -> None:
        while not self._stopping.wait(self._pause_s):
            try:
                self.round()
            except StoreUnavailable:
                logger.warning("%s: the store is away; the next round comes in time", self._name)
            except Exception:
                logger.exception("%s: a round failed", self._name)
