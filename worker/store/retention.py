"""Sweeps finished jobs after their time, with what they kept and staged."""

from __future__ import annotations

import logging

from worker.rounds import Rounds
from worker.settings import Settings
from worker.store.jobs import JobStore

_LONGEST_PAUSE_S = 600.0
logger = logging.getLogger(__name__)


class Retention(Rounds):
    """Deletes what is older than `keep_s`, round after round, while the block is open.

    It runs in the API, which shares the folder of kept files; several do no harm to each other.
    """

    def __init__(self, store: JobStore, settings: Settings) -> None:
        """Prepare; the block begins the sweeps."""
        super().__init__("retention", pause_s=min(_LONGEST_PAUSE_S, settings.keep_s / 10))
        self._store = store
        self._keep_s = settings.keep_s

    def round(self) -> None:
        """Sweep once.

        Raises:
            StoreUnavailable: if the store is away.
        """
        gone = self._store.delete_finished(older_s=self._keep_s)
        if gone:
            logger.info("%d finished jobs were older than %g s and are gone", gone, self._keep_s)
