"""Jobs: submit, look at, list, cancel, resume, delete."""

from __future__ import annotations

import hashlib
import logging
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Response
from pydantic import TypeAdapter

from app.auth import Asking
from app.intake import JobBody, check, optional_object
from app.openapi import JOB_REQUESTS, answer, body_of, problems
from app.routes.deps import HubToken, OwnJob, RequestId, Store, etag_matches
from app.schemas import (
    JOB_EXAMPLE,
    JOB_ID,
    JOB_REQUEST_EXAMPLES,
    CancelBody,
    JobList,
)
from worker.contract import Job
from worker.terms import LONGEST_PAGE, Status

POLL_AFTER_S = 2

logger = logging.getLogger(__name__)
router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

_cancel_schema = TypeAdapter(CancelBody)
_LOCATION = f"/v1/jobs/{JOB_ID}"
_FINISHED = {**JOB_EXAMPLE, "status": "cancelled", "phase": "done"}


async def _cancel_body(fields: Annotated[dict[str, Any], Depends(optional_object)]) -> CancelBody:
    return check(_cancel_schema, fields)


def _accepted(response: Response, job: Job, *, status: int = 202) -> Job:
    response.status_code = status
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    response.headers["Retry-After"] = str(POLL_AFTER_S)
    return job


@router.post(
    "",
    summary="Submit a job",
    status_code=202,
    response_model=Job,
    responses={
        200: answer("This key and body were submitted before", JOB_EXAMPLE, Location=_LOCATION),
        202: answer("Accepted", JOB_EXAMPLE, Location=_LOCATION, Retry_After=str(POLL_AFTER_S)),
        **problems(401, 403, 413, 422, 503),
    },
    openapi_extra=body_of(JOB_REQUESTS, JOB_REQUEST_EXAMPLES),
)
def submit_job(
    response: Response,
    caller: Asking,
    body: JobBody,
    store: Store,
    request_id: RequestId,
    hub_token: HubToken = None,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=255,
            description="the same key with the same body gives the same job, once",
        ),
    ] = None,
) -> Job:
    """Take a job. What is answered with 202 is stored and survives any kill.

    422 tells of everything the request alone shows; what needs the Hub or a disk to know ends
    as a failed job.
    """
    job, created = store.submit(
        body.request,
        owner=caller.owner,
        idempotency_key=idempotency_key,
        body_digest=body.digest,
        hub_token=hub_token,
        request_id=request_id,
    )
    told = "submitted" if created else "submitted before"
    logger.info(told, extra={"job_id": job.id, "owner": caller.owner})
    return _accepted(response, job, status=202 if created else 200)


@router.get(
    "",
    summary="List jobs",
    response_model=JobList,
    responses={
        200: answer("A page of jobs, newest first", {"jobs": [JOB_EXAMPLE], "next": None}),
        **problems(401, 403, 422, 503),
    },
)
def list_jobs(
    caller: Asking,
    store: Store,
    status: Annotated[
        str | None,
        Query(
            pattern="^(queued|running|cancelling|succeeded|failed|cancelled)"
            "(,(queued|running|cancelling|succeeded|failed|cancelled))*$",
            max_length=200,
            description="only these, separated by commas",
            examples=["running,queued"],
        ),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=LONGEST_PAGE)] = 50,
    after: Annotated[
        str | None, Query(max_length=200, description="`next` of the page before")
    ] = None,
) -> JobList:
    """List the jobs that the key may see, newest first."""
    statuses = [Status(name) for name in status.split(",")] if status else []
    jobs, following = store.list(owner=caller.sees, statuses=statuses, limit=limit, after=after)
    return JobList(jobs=jobs, next=following)


@router.get(
    "/{job_id}",
    summary="Look at a job",
    response_model=Job,
    responses={
        200: answer("The job", JOB_EXAMPLE, ETag='W/"5f2b1c…"'),
        304: {"description": "Unchanged since the ETag in If-None-Match"},
        **problems(401, 403, 404, 422, 503),
    },
)
def get_job(
    job: OwnJob,
    if_none_match: Annotated[str | None, Header(description="an ETag seen before")] = None,
) -> Response:
    """Return the job; poll it with If-None-Match, or follow its events instead."""
    body = job.model_dump_json()
    # What is left to wait changes from second to second, and is no news by itself.
    told = job.model_dump_json(exclude={"eta_s"})
    etag = f'W/"{hashlib.sha256(told.encode()).hexdigest()[:32]}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if etag_matches(if_none_match, etag):
        return Response(status_code=304, headers=headers)
    if not job.status.final:
        headers["Retry-After"] = str(POLL_AFTER_S)
    return Response(body, media_type="application/json", headers=headers)


@router.post(
    "/{job_id}/cancel",
    summary="Cancel a job",
    status_code=202,
    response_model=Job,
    responses={
        202: answer("It is cancelled, or about to be", _FINISHED, Location=_LOCATION),
        **problems(401, 403, 404, 409, 413, 422, 503),
    },
    openapi_extra=body_of(["CancelBody"], {"keep": {"value": {"discard": False}}}, required=False),
)
def cancel_job(
    response: Response,
    job: OwnJob,
    body: Annotated[CancelBody, Depends(_cancel_body)],
    store: Store,
) -> Job:
    """Stop a job. Sealed work stays for a resume unless `discard` is true.

    Cancelled already: 202 again. Succeeded or failed: 409.
    """
    return _accepted(response, store.cancel(job.id, discard=body.discard))


@router.post(
    "/{job_id}/resume",
    summary="Resume a job",
    status_code=202,
    response_model=Job,
    responses={
        202: answer("It is queued again", JOB_EXAMPLE, Location=_LOCATION),
        **problems(401, 403, 404, 409, 422, 503),
    },
)
def resume_job(
    response: Response,
    job: OwnJob,
    store: Store,
    request_id: RequestId,
    hub_token: HubToken = None,
) -> Job:
    """Queue a failed or cancelled job again; what is sealed is not done twice."""
    resumed = store.resume(job.id, hub_token=hub_token, request_id=request_id)
    return _accepted(response, resumed)


@router.delete(
    "/{job_id}",
    summary="Delete a job",
    status_code=204,
    response_class=Response,
    responses={
        204: {"description": "It is gone, and so are files the service kept for it"},
        **problems(401, 403, 404, 409, 422, 503),
    },
)
def delete_job(job: OwnJob, store: Store) -> None:
    """Forget a finished job. A result that lies elsewhere stays there."""
    store.delete(job.id)
