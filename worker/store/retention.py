"""Sweeps finished jobs after their time, with what they kept and staged."""

from __future__ import annotations

import logging
import threading
from types import TracebackType

from worker.errors import StoreUnavailable
from worker.settings import Settings
from worker.store.jobs import JobStore

_LONGEST_PAUSE_S = 600.0
logger = logging.getLogger(__name__)


class Retention:
    """A thread that deletes what is older than `keep_s`, while the block is open.

    It runs in the API, which shares the folder of kept files; several do no harm to each other.
    """

    def __init__(self, store: JobStore, settings: Settings) -> None:
        """Prepare; the block begins the sweeps."""
        self._store = store
        self._keep_s = settings.keep_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)

    def __enter__(self) -> Retention:
        """Begin to sweep."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End, after the sweep that runs."""
        self._stopping.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stopping.wait(min(_LONGEST_PAUSE_S, self._keep_s / 10)):
            try:
                gone = self._store.delete_finished(older_s=self._keep_s)
            except StoreUnavailable:
                logger.warning("the store is away; finished jobs are swept later")
                continue
            except Exception:
                logger.exception("a sweep of finished jobs failed")
                continue
            if gone:
                logger.info(
                    "%d finished jobs were older than %g s and are gone", gone, self._keep_s
                )
