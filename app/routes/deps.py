"""What several routes need: the store, the settings, the job that the path names, headers."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Header, Path, Request

from app.auth import Asking
from app.schemas import JOB_ID
from worker.contract import Job
from worker.settings import Settings
from worker.store import JobStore


async def _store(request: Request) -> JobStore:
    store: JobStore = request.app.state.store
    return store


async def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


async def _request_id(request: Request) -> str:
    given: str = request.state.request_id
    return given


Store = Annotated[JobStore, Depends(_store)]
ServiceSettings = Annotated[Settings, Depends(_settings)]
RequestId = Annotated[str, Depends(_request_id)]
JobId = Annotated[str, Path(max_length=200, examples=[JOB_ID], description="the job's id")]
HubToken = Annotated[
    str | None,
    Header(
        alias="X-Hub-Token",
        max_length=1000,
        description="a token of the Hub, for this job only; kept encrypted, erased at the end",
    ),
]


def own_job(job_id: JobId, caller: Asking, store: Store) -> Job:
    """Return the job the path names; another owner's is not found."""
    return store.get(job_id, owner=caller.sees)


OwnJob = Annotated[Job, Depends(own_job)]


def etag_matches(header: str | None, etag: str) -> bool:
    """Say whether an If-None-Match header names `etag`, compared weakly (RFC 9110 13.1.2)."""
    if header is None:
        return False
    names = [name.strip().removeprefix("W/") for name in header.split(",")]
    return "*" in names or etag.removeprefix("W/") in names
