"""Plans: what a job would do, made by a worker from headers alone while the caller waits."""

from __future__ import annotations

from typing import Any, cast

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool

from app.auth import Asking
from app.errors import TooManyRequests
from app.intake import PlanBody
from app.openapi import answer, body_of, problems
from app.routes.deps import HubToken, RequestId, Store
from app.schemas import PLAN_EXAMPLE, PLAN_REQUEST_EXAMPLES, PlanAnswer
from worker.contract import BaseToPissa

PLAN_TIMEOUT_S = 30.0
MAX_WAITING = 32

router = APIRouter(prefix="/v1/plans", tags=["plans"])


@router.post(
    "",
    summary="Plan a job without doing it",
    response_model=PlanAnswer,
    responses={
        200: answer("What the job would do", PLAN_EXAMPLE),
        **problems(401, 403, 404, 413, 422, 429, 503, 504),
    },
    openapi_extra=body_of(["BaseToPissa"], PLAN_REQUEST_EXAMPLES),
)
async def make_plan(
    request: Request,
    _caller: Asking,
    body: PlanBody,
    store: Store,
    request_id: RequestId,
    hub_token: HubToken = None,
) -> dict[str, Any]:
    """Say which matrices a job would decompose, what it refuses, and what it would cost.

    Waits up to 30 seconds for a worker, then answers 504.
    """
    # Waiting has threads of its own: it must not keep the short calls of all others waiting.
    waiting: CapacityLimiter = request.app.state.plan_limiter
    if waiting.available_tokens <= 0:
        raise TooManyRequests(
            f"{MAX_WAITING} plans are being waited for already", hint="ask again in a few seconds"
        )
    timeout_s: float = request.app.state.plan_timeout_s
    asked = cast(BaseToPissa, body.request)
    plan_id = await run_in_threadpool(
        store.request_plan, asked, hub_token=hub_token, request_id=request_id
    )
    return await to_thread.run_sync(
        lambda: store.plan_result(plan_id, timeout_s=timeout_s), limiter=waiting
    )
