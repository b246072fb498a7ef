"""Counts what the chaos suite has done: one line of JSON a round, summed up by this program.

``PISSA_CHAOS_TALLY=FILE make test-chaos`` appends to FILE; ``python tests/chaos/tally.py FILE``
prints the sums.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from script import Script


def record(script: Script, *, passed: bool, seconds: float, broken: int) -> None:
    """Append one round to the file that the environment names."""
    path = os.environ.get("PISSA_CHAOS_TALLY")
    if not path:
        return
    line = {
        "seed": script.seed,
        "passed": passed,
        "seconds": round(seconds, 1),
        "jobs": [job.recipe.name for job in script.jobs],
        "cancelled": sum(job.cancel_s is not None for job in script.jobs),
        "resumed": sum(job.resume for job in script.jobs),
        "faults": [fault.kind for fault in script.faults],
        "streams_broken": broken,
    }
    with Path(path).open("a") as file:
        file.write(json.dumps(line) + "\n")


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sum rounds up: how many, of what, and how they ended."""
    faults = Counter(kind for line in rounds for kind in line["faults"])
    jobs = Counter(name for line in rounds for name in line["jobs"])
    return {
        "rounds": len(rounds),
        "failed_rounds": [line["seed"] for line in rounds if not line["passed"]],
        "faults": {"all": faults.total(), **dict(faults.most_common())},
        "jobs": {"all": jobs.total(), **dict(sorted(jobs.items()))},
        "cancelled": sum(line["cancelled"] for line in rounds),
        "resumed": sum(line["resumed"] for line in rounds),
        "streams_broken_and_gone_on": sum(line["streams_broken"] for line in rounds),
        "seconds_a_round": {
            "median": statistics.median(line["seconds"] for line in rounds),
            "longest": max(line["seconds"] for line in rounds),
        },
    }


if __name__ == "__main__":
    lines = [
        json.loads(text) for name in sys.argv[1:] for text in Path(name).read_text().splitlines()
    ]
    print(json.dumps(summary(lines), indent=1))
