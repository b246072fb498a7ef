"""What the store counts for whoever runs the service; numbers that only grow, and a few that vary.

The counters are written by the same scripts that change the jobs, so they count each thing once,
whoever asks, and outlive every process. They start anew only with an empty store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from worker.terms import Status


@dataclass(frozen=True, slots=True)
class Figures:
    """The store's numbers at one moment.

    Attributes:
        jobs: how many there are in each state.
        queue_age_s: how long the job that waits longest has been queued; 0 if none waits.
        tasks: how many are ``sent`` to workers, ``leased`` by them and ``delayed`` for a retry.
        peaks: the most memory, in bytes, that a task of each worker has held.
        totals: counters by group and label: ``totals["failed"]["repo_not_found"]``.
    """

    jobs: Mapping[Status, int]
    queue_age_s: float
    tasks: Mapping[str, int]
    peaks: Mapping[str, int]
    totals: Mapping[str, Mapping[str, int]]


def as_figures(answer: Mapping[str, Any]) -> Figures:
    """Read the answer of the operation ``figures``."""
    counted = _pairs(answer["jobs"])
    totals: dict[str, dict[str, int]] = {}
    for name, value in _pairs(answer["totals"]).items():
        group, _, label = name.partition(":")
        totals.setdefault(group, {})[label] = value
    return Figures(
        jobs={status: counted.get(status, 0) for status in Status},
        queue_age_s=answer["queue_age_ms"] / 1000,
        tasks=answer["tasks"],
        peaks=_pairs(answer["peaks"]),
        totals=totals,
    )


def _pairs(flat: Sequence[str]) -> dict[str, int]:
    return {flat[index]: int(float(flat[index + 1])) for index in range(0, len(flat), 2)}
