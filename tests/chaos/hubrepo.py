"""What lies in a repo of the test Hub, asked from outside by plain requests."""

from __future__ import annotations

import time
from typing import Any

import httpx2

USER, TOKEN = "me", "hf_" + "chaos" * 7
_HEADERS = {"Authorization": f"Bearer {TOKEN}"}


def files_of(endpoint: str, repo_id: str) -> dict[str, str]:
    """Return the checksum of every file on the main branch: sha256 of large ones, git's of small.

    A repo that is not there, or holds only what the Hub puts into a new one, has none.
    """
    answer = _ask(endpoint, f"/api/models/{repo_id}/tree/main?recursive=true")
    entries = answer.json() if answer.status_code == 200 else []
    found = {
        entry["path"]: str(entry.get("lfs", {}).get("oid") or entry["oid"])
        for entry in entries
        if entry["type"] == "file"
    }
    return {} if set(found) == {".gitattributes"} else found


def branches_of(endpoint: str, repo_id: str) -> list[str]:
    """Return the names of a repo's branches but for the main one."""
    answer = _ask(endpoint, f"/api/models/{repo_id}/refs")
    branches = answer.json()["branches"] if answer.status_code == 200 else []
    return [str(branch["name"]) for branch in branches if branch["name"] != "main"]


def delete(endpoint: str, repo_id: str) -> None:
    """Delete a repo of ours, if it is there."""
    _ask(endpoint, "/api/repos/delete", "DELETE", json={"name": repo_id.partition("/")[2]})


def _ask(endpoint: str, path: str, method: str = "GET", **fields: Any) -> httpx2.Response:
    deadline = time.monotonic() + 60
    while True:
        try:
            return httpx2.request(method, endpoint + path, headers=_HEADERS, timeout=30, **fields)
        except httpx2.TransportError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
