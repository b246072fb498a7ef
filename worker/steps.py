"""What each task does: for a job, the step of its kind; for a plan request, the plan."""

from __future__ import annotations

from collections.abc import Mapping

from worker.contract import BaseToPissa
from worker.holding import Hold
from worker.kinds import KINDS
from worker.kinds.telling import Step
from worker.store.tasks import Claim
from worker.wiring import Context


def prepare(context: Context, claim: Claim, hold: Hold) -> None:
    """Plan the job and refuse what cannot end well; the store makes a task of each shard."""
    KINDS[claim.kind].prepare(context, claim, hold)


def shard(context: Context, claim: Claim, hold: Hold) -> None:
    """Do one shard of the work, telling every matrix; leave between two when asked to."""
    KINDS[claim.kind].shard(context, claim, hold)


def publish(context: Context, claim: Claim, hold: Hold) -> None:
    """Make the result visible, record it, then sweep what was staged."""
    KINDS[claim.kind].publish(context, claim, hold)


def discard(context: Context, claim: Claim, hold: Hold) -> None:
    """Throw away what an ending job has staged: its scratch, or all of it."""
    KINDS[claim.kind].discard(context, claim, hold)


def plan(context: Context, claim: Claim, hold: Hold) -> None:
    """Make a plan that somebody waits for."""
    from pissa_core.admission import check_budgets
    from pissa_core.planning import make_plan

    request = context.request_of(claim, BaseToPissa)
    source, limits = context.source(claim, request.model), context.limits(request)
    made = make_plan(source, request.pissa, **limits)
    context.check_plan_size(made, source)
    check_budgets(made, source, disk_budget=limits["disk_budget"], scratch=limits.get("scratch"))
    context.tasks.finish(claim, made.public())


STEPS: Mapping[str, Step] = {
    "prepare": prepare,
    "shard": shard,
    "publish": publish,
    "discard": discard,
    "plan": plan,
}
