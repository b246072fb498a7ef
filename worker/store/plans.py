"""Plans that somebody waits for: a plan request is a job that no list shows."""

from __future__ import annotations

import json
import time
from typing import Any

from worker.errors import PlanTimeout, error_from
from worker.store.connection import Connection
from worker.store.events import FINAL, Events
from worker.terms import EventType


def wait_for_plan(
    connection: Connection, events: Events, plan_id: str, timeout_s: float
) -> dict[str, Any]:
    """Return a plan as soon as it is made.

    Raises:
        PlanTimeout: if it is not there in time.
        PissaError: what the planner met, rebuilt from its code.
    """
    deadline, seen = time.monotonic() + timeout_s, "0-0"
    while (left := deadline - time.monotonic()) > 0:
        for event in events.wait(plan_id, seen, left):
            seen = event.id
            if event.type is EventType.FAILED:
                data = event.data
                raise error_from(data["code"], data["message"], data.get("hint"))
            if event.type in FINAL:
                return _plan(connection, plan_id)
    raise PlanTimeout(
        f"no plan was made within {timeout_s:g} s",
        hint="the planner is busy or no worker runs; ask again, or submit the job: it waits",
    )


def _plan(connection: Connection, plan_id: str) -> dict[str, Any]:
    client = connection.client
    text = connection.ask(lambda: client.hget(f"pissa:job:{plan_id}", "result"))
    plan: dict[str, Any] = json.loads(str(text))
    return plan
