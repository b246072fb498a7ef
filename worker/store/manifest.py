"""What the manifest of a job says while the job still runs."""

from __future__ import annotations

import json
from typing import Any

from pissa_core.plan import Plan
from worker.contract import Job
from worker.store.connection import Connection


def rows_so_far(connection: Connection, job: Job) -> dict[str, Any]:
    """Return the manifest as far as it is known: the rows that are done, no files yet."""
    client = connection.client
    text = connection.ask(lambda: client.get(f"pissa:job:{job.id}:plan"))
    known: dict[str, Any] = {
        "schema": 1,
        "kind": job.kind,
        "source": {"ref": job.request.get("model"), "commit": None},
        "config": job.request.get("pissa", {}),
        "versions": {},
        "files": {},
        "matrices": [],
        "totals": {"matrices": 0},
    }
    if text is None:
        return known
    from pissa_core.report.figures import in_plan_order, totals

    plan = Plan.from_json(str(text))
    stored: Any = connection.ask(lambda: client.hvals(f"pissa:job:{job.id}:rows"))
    rows = in_plan_order(plan, [json.loads(row) for row in stored])
    return known | {
        "source": {"ref": plan.source, "commit": plan.commit},
        "config": dict(plan.config),
        "matrices": rows,
        "totals": totals(plan, rows).as_dict(),
    }
