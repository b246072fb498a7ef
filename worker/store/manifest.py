"""What the manifest of a job says while the job still runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pissa_core.plan import Plan
from worker.contract import Job
from worker.store.connection import Connection
from worker.terms import MAIN_SOURCES


def rows_so_far(connection: Connection, job: Job) -> dict[str, Any]:
    """Return the manifest as far as it is known: the rows that are done, no files yet."""
    client = connection.client
    text = connection.ask(lambda: client.get(f"pissa:job:{job.id}:plan"))
    plan: dict[str, Any] = {} if text is None else json.loads(str(text))
    stored: Any = connection.ask(lambda: client.hvals(f"pissa:job:{job.id}:rows"))
    # A verification's findings lie beside its rows, and are for its report.
    rows = [row for row in map(json.loads, stored) if "module" in row]
    known: dict[str, Any] = {
        "schema": 1,
        "kind": job.kind,
        "source": {
            "ref": plan.get("source", _first_source(job)),
            "commit": plan.get("commit"),
        },
        "config": plan.get("config", job.request.get("pissa") or job.request.get("lora") or {}),
        "versions": {},
        "files": {},
        "matrices": sorted(rows, key=_number_in_path),
        "totals": {"matrices": len(rows)},
    }
    if job.kind != "base-to-pissa" or text is None:
        return known
    from pissa_core.report.figures import in_plan_order, totals

    made = Plan.from_json(str(text))
    rows = in_plan_order(made, rows)
    return known | {"matrices": rows, "totals": totals(made, rows).as_dict()}


def _first_source(job: Job) -> str | None:
    named = (job.request.get(field) for field in MAIN_SOURCES)
    return next((ref for ref in named if ref), None)


def _number_in_path(row: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Order by path, layer 10 after layer 9."""
    parts = str(row["tensor"]).split(".")
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
