"""Seals put on a staging branch: one commit for all that are ready, no more often than is wise."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from pissa_core import leaving
from pissa_core.adapters.hub.changes import Change
from pissa_core.adapters.hub.client import Pinned
from pissa_core.adapters.hub.pacing import Pace
from pissa_core.adapters.hub.pending import Pending, Ready
from pissa_core.adapters.hub.uploading import status_of
from pissa_core.adapters.hub.waiting import Pause, pause
from pissa_core.adapters.hub.writer import CannotCopy, HubWriter, Moved
from pissa_core.errors import PissaError, RateLimited

_REFUSED = (400, 404, 422)  # what is in a commit is wrong, perhaps what another has put into it


class Sealing:
    """The commits of one staging branch that hold seals."""

    def __init__(
        self,
        writer: HubWriter,
        branch: str,
        *,
        pending: Pending,
        pace: Pace,
        required: Callable[[], Pinned],
        is_sealed: Callable[[str, Pinned], bool],
    ) -> None:
        """Open no connection yet.

        Args:
            writer: to the repo.
            branch: the staging branch.
            pending: where seals of this machine wait for each other.
            pace: how often to commit.
            required: returns what is on the branch, or raises if it is gone.
            is_sealed: whether a shard has a seal there already.
        """
        self._writer = writer
        self._branch = branch
        self._pending = pending
        self._pace = pace
        self._required = required
        self._is_sealed = is_sealed

    def commit(self, ready: Ready) -> None:
        """Commit a seal with all others that are ready here, unless one of them did so for us.

        What becomes ready while a commit is under way goes with the next, also where the Hub has
        that commit wait (429).

        Raises:
            Cancelled: if the branch was removed meanwhile.
            CannotCopy: if a file of this seal is not to be had from its repo.
        """
        with self._pending.joined(ready) as record, self._pending.turn(record):
            alone = False
            while not self._is_sealed(ready.shard, state := self._required()):
                leaving.check()  # whoever has lost its lease seals nothing
                if self._has_paused(state):
                    continue
                others = [] if alone else self._pending.beside(record)
                together = [ready, *self._unsealed(others, ready.shard, state)]
                try:
                    self._writer.commit(_change(together), branch=self._branch, parent=state.commit)
                except Moved:
                    leaving.sleep(random.uniform(0, 0.2))
                except (CannotCopy, PissaError) as error:
                    if len(together) == 1 or not _may_be_anothers(error):
                        raise
                    alone = True
                else:
                    return

    def _unsealed(self, others: Sequence[Ready], but: str, state: Pinned) -> list[Ready]:
        # Of two attempts at one shard, the first alone seals it.
        once = {each.shard: each for each in reversed(others) if each.shard != but}
        return [each for shard, each in once.items() if not self._is_sealed(shard, state)]

    def _has_paused(self, state: Pinned) -> bool:
        """Wait, if the repo has seen so many commits that the Hub may soon refuse; say whether."""
        if seals_in(state) < self._pace.at_once:
            return False
        times = [at for _, at in self._writer.history(state.commit)]
        seconds = self._pace.wait_s(times, datetime.now(UTC))
        if seconds <= 0:
            return False
        error = RateLimited(
            f"commits to {self._writer.repo_id} are spread over the hour, to stay below the "
            "Hub's limit"
        )
        pause(Pause(error, seconds), self._writer.client.on_wait)
        return True


def seals_in(state: Pinned) -> int:
    """Count the seals on a branch, intact or not."""
    return sum(path.startswith("staged/") and path.endswith("/seal.json") for path in state.files)


def _change(batch: Sequence[Ready]) -> Change:
    operations = [operation for ready in batch for operation in ready.operations]
    wanted = {path: file for ready in batch for path, file in ready.wanted.items()}
    what = batch[0].shard if len(batch) == 1 else f"{len(batch)} shards"
    return Change(operations, wanted, f"Seal {what}")


def _may_be_anothers(error: Exception) -> bool:
    return isinstance(error, CannotCopy) or (
        error.__cause__ is not None and status_of(error.__cause__) in _REFUSED
    )
