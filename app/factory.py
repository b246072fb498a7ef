"""Put the API together; nothing here reads the environment or loads torch."""

from __future__ import annotations

from anyio import CapacityLimiter
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.types import Lifespan

from app import openapi
from app.auth import ApiKeys
from app.errors import add_error_handlers
from app.limits import Limits
from app.middleware import Guard
from app.routes import events, jobs, operations, pages, plans, results
from app.traffic import Traffic
from pissa_core import __version__
from worker.settings import Settings
from worker.store import JobStore

_DESCRIPTION = """\
Turns a Hugging Face checkpoint into its PiSSA form: the residual base model and the initial
adapter, which stock PEFT loads with no SVD.

Submit a job, follow it, fetch the result. Every error is `application/problem+json` (RFC 9457)
with a stable `code`. Where the service has API keys, send one as `Authorization: Bearer KEY`; a
token of the Hub goes only into `X-Hub-Token`.
"""
_TAGS = [
    {"name": "jobs", "description": "Submit, follow, cancel, resume, delete."},
    {"name": "results", "description": "The manifest and the files of a job."},
    {"name": "plans", "description": "What a job would do, from headers alone."},
    {"name": "operations", "description": "For who runs the service; need no key."},
]


def create_app(
    settings: Settings,
    store: JobStore | None = None,
    *,
    lifespan: Lifespan[FastAPI] | None = None,
    plan_timeout_s: float = plans.PLAN_TIMEOUT_S,
) -> FastAPI:
    """Return the API over a job store; it keeps no state of its own.

    Args:
        settings: the operator's.
        store: an open store; None where `lifespan` puts one into ``app.state.store``.
        lifespan: what opens and closes with the server.
        plan_timeout_s: how long a request for a plan waits.
    """
    app = FastAPI(
        title="PiSSA service",
        summary="Convert checkpoints to PiSSA, shard by shard, as a service.",
        description=_DESCRIPTION,
        version=__version__,
        openapi_tags=_TAGS,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[Middleware(Guard)],
        lifespan=lifespan,
    )
    app.state.settings = settings
    app.state.store = store
    app.state.api_keys = ApiKeys(settings.api_keys)
    app.state.limits = Limits(settings)
    app.state.traffic = Traffic()
    app.state.plan_timeout_s = plan_timeout_s
    app.state.plan_limiter = CapacityLimiter(plans.MAX_WAITING)
    add_error_handlers(app)
    for module in (jobs, events, results, plans, operations, pages):
        app.include_router(module.router)
    pages.mount_assets(app)
    app.openapi = lambda: openapi.document(app)  # type: ignore[method-assign]
    return app
