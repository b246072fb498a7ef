"""Counts what the chaos suite has done: one line of JSON a round, summed up by this program.

``PISSA_CHAOS_TALLY=FILE make test-chaos`` appends to FILE; ``python tests/chaos/tally.py FILE``
prints the sums, with ``--onto SUMS`` added to earlier ones. Times are not added up: those of a
machine that does other work besides say little (``--times`` takes the new ones).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
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
        "kinds": [job.recipe.kind for job in script.jobs],
        "places": [job.recipe.place for job in script.jobs],
        "cancelled": sum(job.cancel_s is not None for job in script.jobs),
        "resumed": sum(job.resume for job in script.jobs),
        "faults": [fault.kind for fault in script.faults],
        "streams_broken": broken,
    }
    with Path(path).open("a") as file:
        file.write(json.dumps(line) + "\n")


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sum rounds up, in the order they were played: how many, of what, and how they ended."""
    last = {line["seed"]: line["passed"] for line in rounds}
    failed = {line["seed"] for line in rounds if not line["passed"]}
    return {
        "rounds": len(rounds),
        "failed_rounds": sorted(seed for seed in failed if not last[seed]),
        "failed_and_passed_since": sorted(seed for seed in failed if last[seed]),
        "faults": _counted(rounds, "faults"),
        "kinds": _counted(rounds, "kinds"),
        "places": _counted(rounds, "places"),
        "jobs": _counted(rounds, "jobs"),
        "cancelled": sum(line["cancelled"] for line in rounds),
        "resumed": sum(line["resumed"] for line in rounds),
        "streams_broken_and_gone_on": sum(line["streams_broken"] for line in rounds),
        "seconds_a_round": {
            "median": statistics.median(line["seconds"] for line in rounds),
            "longest": max(line["seconds"] for line in rounds),
            "rounds": len(rounds),
        },
    }


def added(earlier: Mapping[str, Any], later: Mapping[str, Any], *, times: bool) -> dict[str, Any]:
    """Add two sums up; the seconds are those of one of them."""
    total = dict(later)
    for name, value in earlier.items():
        if isinstance(value, int | list):
            total[name] = value + later[name]
        elif name != "seconds_a_round":
            total[name] = _sorted(Counter(value) + Counter(later[name]))
        elif not times:
            total[name] = value
    return total


def _counted(rounds: Sequence[Mapping[str, Any]], field: str) -> dict[str, int]:
    counts = Counter(name for line in rounds for name in line[field])
    return _sorted(Counter({"all": counts.total()}) + counts)


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rounds", nargs="+", type=Path, help="files of lines, one a round")
    parser.add_argument("--onto", type=Path, metavar="SUMS", help="earlier sums to add them to")
    parser.add_argument("--times", action="store_true", help="take the seconds of the new rounds")
    options = parser.parse_args()
    lines = [json.loads(text) for path in options.rounds for text in path.read_text().splitlines()]
    sums = summary(lines)
    if options.onto:
        sums = added(json.loads(options.onto.read_text()), sums, times=options.times)
    print(json.dumps(sums, indent=1))


if __name__ == "__main__":
    main()
