"""The web page and the documentation, with everything they load: no build step, no CDN."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

WEB = Path(__file__).parent.parent / "web"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
# Swagger UI sets style attributes as it draws.
DOCS_POLICY = PAGE_POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")

router = APIRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])
async def page() -> FileResponse:
    """Serve the web page."""
    return _html("index.html", PAGE_POLICY)


@router.api_route("/docs", methods=["GET", "HEAD"])
async def docs() -> FileResponse:
    """Serve Swagger UI over /openapi.json."""
    return _html("docs.html", DOCS_POLICY)


def _html(name: str, policy: str) -> FileResponse:
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
    return FileResponse(WEB / name, media_type="text/html", headers=headers)


def mount_assets(app: FastAPI) -> None:
    """Serve the files beside the page, and Swagger UI as `fastapi-offline` packs it."""
    app.mount("/web", StaticFiles(directory=WEB), name="web")
    app.mount("/swagger", StaticFiles(directory=_swagger_folder()), name="swagger")


def _swagger_folder() -> Path:
    # Found, not imported: only its two files are wanted.
    spec = find_spec("fastapi_offline")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("fastapi-offline, which brings Swagger UI's files, is not installed")
    return Path(spec.submodule_search_locations[0]) / "static"
