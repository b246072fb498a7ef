"""What a job made: its manifest, and its files where the service can reach them."""

from __future__ import annotations

import hashlib
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Request, Response
from fastapi.responses import FileResponse, JSONResponse

from app.errors import NoSuchRoute, RangeNotSatisfiable
from app.openapi import answer, problems
from app.routes.deps import OwnJob, ServiceSettings, Store, etag_matches
from app.schemas import FILE_EXAMPLE, MANIFEST_EXAMPLE, FileEntry, FileList, ManifestAnswer
from pissa_core.layout.sidefiles import MANIFEST
from pissa_core.refs import LocalRef, parse_ref, resolve_local
from worker.contract import Job
from worker.errors import Conflict
from worker.settings import Settings
from worker.store import JobStore
from worker.terms import Status

router = APIRouter(prefix="/v1/jobs", tags=["results"])


@router.get(
    "/{job_id}/manifest",
    summary="The manifest of a job",
    response_model=ManifestAnswer,
    responses={
        200: answer("The manifest, or its rows so far", MANIFEST_EXAMPLE),
        **problems(401, 403, 404, 409, 422, 503),
    },
)
def job_manifest(job: OwnJob, store: Store) -> Response:
    """Return the published manifest, or what is known of it while the job runs."""
    return JSONResponse(store.manifest(job.id), headers={"Cache-Control": "private, no-cache"})


@router.get(
    "/{job_id}/files",
    summary="List the files of a result",
    response_model=FileList,
    responses={
        200: answer("Every file, with its checksum", {"files": [FILE_EXAMPLE]}),
        **problems(401, 403, 404, 409, 422, 503),
    },
)
def job_files(job: OwnJob, store: Store, settings: ServiceSettings) -> FileList:
    """List the files of a succeeded job, wherever they lie; 409 while there is no result yet."""
    folder = _folder(job, settings)
    return FileList(files=list(_published(job, store, folder).values()))


@router.get(
    "/{job_id}/files/{path:path}",
    summary="Download a file of a result",
    response_class=FileResponse,
    responses={
        200: {
            "description": "The file; its ETag is its sha256",
            "content": {"application/octet-stream": {"schema": {"type": "string"}}},
        },
        206: {
            "description": "The range asked for",
            "content": {"application/octet-stream": {"schema": {"type": "string"}}},
        },
        304: {"description": "If-None-Match names the file's ETag"},
        **problems(401, 403, 404, 409, 416, 422, 503),
    },
)
def job_file(
    request: Request,
    job: OwnJob,
    store: Store,
    settings: ServiceSettings,
    path: Annotated[str, Path(examples=[FILE_EXAMPLE["path"]], max_length=4096)],
    if_none_match: Annotated[str | None, Header()] = None,
    range_: Annotated[str | None, Header(alias="Range", examples=["bytes=0-1023"])] = None,
) -> Response:
    """Send a file, or the one range asked for; a Range that is none is ignored, as HTTP has it.

    404 also where the result lies on the Hub: it is downloaded from there.
    """
    folder = _folder(job, settings)
    entry = _published(job, store, folder).get(path)
    if entry is None:
        raise NoSuchRoute(f"the result has no file {path!r}", hint="…/files lists what there is")
    file = _inside(folder, path)
    if file is None:
        raise _not_here(job)
    headers = {"ETag": f'"{entry.sha256}"', "Cache-Control": "private, no-cache"}
    if etag_matches(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    _settle_range(request, range_, file.stat().st_size)
    return FileResponse(
        file,
        headers=headers,
        # Never shown in place: a README or SVG of a stranger's model is not this site's.
        filename=file.name,
        media_type="application/octet-stream",
    )


# The same download, asked for its size alone; documented once.
router.add_api_route(
    "/{job_id}/files/{path:path}", job_file, methods=["HEAD"], include_in_schema=False
)


def _folder(job: Job, settings: Settings) -> FilePath | None:
    """Return where the result of a succeeded job lies; None if not where this process can read."""
    if job.status is not Status.SUCCEEDED:
        raise Conflict(
            f"the job is {job.status.value}; only a succeeded one has files",
            hint=f"follow /v1/jobs/{job.id}/events until it ends",
        )
    output = job.request.get("output")
    if output is None:
        return settings.files_dir / job.id
    reference = parse_ref(output["ref"])
    if isinstance(reference, LocalRef) and settings.local_root is not None:
        return resolve_local(reference, settings.local_root)
    return None


def _published(job: Job, store: JobStore, folder: FilePath | None) -> dict[str, FileEntry]:
    """Return what the manifest names, and the manifest itself where it can be read."""
    if job.kind == "verify":  # its report is all there is, and names files of the converted model
        return {}
    named: dict[str, Any] = store.manifest(job.id)["files"]
    entries = {path: FileEntry(path=path, **info) for path, info in sorted(named.items())}
    manifest = _inside(folder, MANIFEST)
    if manifest is not None:
        content = manifest.read_bytes()
        entries[MANIFEST] = FileEntry(
            path=MANIFEST, size=len(content), sha256=hashlib.sha256(content).hexdigest()
        )
    return entries


def _not_here(job: Job) -> NoSuchRoute:
    where = (job.result or {}).get("output")
    return NoSuchRoute(
        "the file does not lie on the service's storage"
        + ("" if where is None else f"; the result is at {where}"),
        hint="download it from there" if where else None,
    )


def _inside(folder: FilePath | None, path: str) -> FilePath | None:
    """Return the regular file at `path` below `folder`, if following symlinks stays below it."""
    if folder is None:
        return None
    try:
        root = folder.resolve(strict=True)
        file = (root / path).resolve(strict=True)
    except (OSError, ValueError):
        return None
    return file if root in file.parents and file.is_file() else None


def _settle_range(request: Request, header: str | None, size: int) -> None:
    """Leave a Range header only where `FileResponse` will answer it as RFC 9110 says.

    Raises:
        RangeNotSatisfiable: if it is well-formed and begins behind the end of the file.
    """
    if header is None:
        return
    if one_range(header, size) is None:
        request.scope["headers"] = [
            (name, value) for name, value in request.scope["headers"] if name != b"range"
        ]


def one_range(header: str, size: int) -> tuple[int, int] | None:
    """Read ``bytes=first-last``, ``bytes=first-`` or ``bytes=-suffix`` as half-open offsets.

    None for anything else (several ranges, other units, nonsense): the whole file is the answer.
    """
    unit, equals, text = header.partition("=")
    first, dash, last = text.strip().partition("-")
    digits = all(not part or (part.isascii() and part.isdigit()) for part in (first, last))
    if unit.strip().lower() != "bytes" or not (equals and dash and digits and (first or last)):
        return None
    if first and last and int(last) < int(first):
        return None
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= size or not (first or int(last)):
        raise RangeNotSatisfiable(
            f"the range {header!r} begins behind the file's {size} bytes", size=size
        )
    return start, stop
