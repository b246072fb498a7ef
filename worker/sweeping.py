"""Sweeps this machine's disk: scratch of jobs that are over, whoever was told to discard it.

The task that ends a job removes the scratch that lies on its worker's disk. What else there is
(other machines had shards of the job, a worker was away or asleep when it ended) goes here.
"""

from __future__ import annotations

import logging

from pissa_core.adapters.ledger import Ledger
from pissa_core.adapters.local.scratch import discard_result
from worker.rounds import Rounds
from worker.settings import Settings
from worker.store.connection import Connection

logger = logging.getLogger(__name__)


class Sweeper(Rounds):
    """Removes it, round after round, while the block is open.

    Locks tell which scratch somebody still works in. Scratch that the store knows nothing of is
    left alone: a command that was interrupted may go on from it.
    """

    def __init__(self, connection: Connection, settings: Settings) -> None:
        """Prepare; the block begins the sweeps."""
        super().__init__("sweeper", pause_s=settings.reap_s)
        self._connection = connection
        self._folder = settings.scratch_dir
        self._ledger = Ledger(settings.scratch_dir, settings.disk_budget)

    def round(self) -> None:
        """Sweep once.

        Raises:
            StoreUnavailable: if the store is away.
        """
        digests = [folder.name for folder in self._folder.glob("[!.]*")]
        for digest in self._over(digests) if digests else ():
            discard_result(self._folder / digest)
            if not (self._folder / digest).exists():
                logger.info("scratch of %s is gone: its jobs are over", digest)
        self._ledger.sweep()

    def _over(self, digests: list[str]) -> list[str]:
        return self._connection.call("over", digests=digests)["over"] or []
