"""Branches that nobody comes back for: staging of other results, and results never shown."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from pissa_core.adapters.hub.writer import HubWriter
from pissa_core.errors import RevisionNotFound

PREFIX = "pissa-staging-"
RESULT = "-result"
"""Ends the name of the branch on which a commit is made that a new branch is then pointed at."""

KEPT = timedelta(days=7)
"""How long a staging branch may lie untouched before it is swept."""


def sweep_stale(writer: HubWriter, *, but: str, now: datetime | None = None) -> list[str]:
    """Remove staging branches of other results that nobody has added to for `KEPT`.

    With each goes the branch on which its result was made; one whose staging is gone goes, too.
    """
    oldest = (now or datetime.now(UTC)) - KEPT
    ours = [name for name in writer.branches() if name.startswith(PREFIX)]
    staging = {name for name in ours if not name.endswith(RESULT)}
    stale = {name for name in staging - {but} if _is_older(writer, name, oldest)}
    made = {name for name in ours if name not in staging}
    swept = stale | {name for name in made if name.removesuffix(RESULT) not in staging - stale}
    for branch in sorted(swept):
        writer.delete_branch(branch)
    return sorted(swept)


def _is_older(writer: HubWriter, branch: str, oldest: datetime) -> bool:
    try:
        history = writer.history(branch)
    except RevisionNotFound:  # another sweeps, too
        return False
    return bool(history) and history[0][1] < oldest
