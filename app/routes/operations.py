"""For who runs the service: is it alive, is it ready, what is it doing."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from app.errors import problem
from app.metrics import StoreCollector
from app.openapi import answer, problems
from app.routes.deps import Store
from app.schemas import READY_EXAMPLE, Liveness, Readiness, WorkerEntry
from app.traffic import Traffic
from worker.errors import StoreUnavailable

router = APIRouter(tags=["operations"])


@router.get(
    "/livez",
    summary="Is the process alive",
    response_model=Liveness,
    responses={200: answer("It answers", {"status": "ok"}), **problems()},
)
async def livez() -> Liveness:
    """Answer without asking anything else."""
    return Liveness()


@router.get(
    "/readyz",
    summary="Can jobs be taken",
    response_model=Readiness,
    responses={200: answer("The store answers", READY_EXAMPLE), **problems(503)},
)
def readyz(store: Store) -> Response | Readiness:
    """Say whether the store answers, and which workers were heard of lately.

    A service without workers is ready: it takes jobs, which wait.
    """
    try:
        store.ping()
        workers = [
            WorkerEntry(name=w.name, device=w.device, busy=w.busy, seen_s=w.seen_s)
            for w in store.workers()
        ]
    except StoreUnavailable as error:
        return problem(error, store="away", workers=[])
    return Readiness(store="ok", workers=workers)


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={
        200: {
            "description": "Computed from the store when asked",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        },
        **problems(503),
    },
)
def metrics(request: Request, store: Store) -> Response:
    """Count jobs, work and workers as the store knows them, and what this process answered."""
    traffic: Traffic = request.app.state.traffic
    registry = CollectorRegistry()
    registry.register(StoreCollector(store))
    text = generate_latest(registry) + generate_latest(traffic.registry)
    return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})
