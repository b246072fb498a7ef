"""The reading routes of the test Hub: what the real one answers, and to whom."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, quote

from hub.repos import Blob, Bytes, Commit, File, Repo, Token
from hub.state import Hub


@dataclass
class Answer:
    """Status, headers and body of an answer; the body is a blob so that ranges cost no memory."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: Blob = field(default_factory=lambda: Bytes(b""))
    ranged: bool = False


class Refusal(Exception):
    """An answer that is an error, as the Hub words it."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def refused(refusal: Refusal) -> Answer:
    answer = as_json({"error": refusal.message}, refusal.status)
    answer.headers["X-Error-Message"] = refusal.message
    if refusal.code:
        answer.headers["X-Error-Code"] = refusal.code
    return answer


def as_json(value: Any, status: int = 200) -> Answer:
    return Answer(status, {"Content-Type": "application/json"}, Bytes(json.dumps(value).encode()))


@dataclass
class Call:
    """One request on its way through a route."""

    hub: Hub
    token: Token | None
    query: dict[str, str]
    body: bytes

    def repo(self, repo_id: str) -> Repo:
        """Return a repo that the token may see."""
        repo = self.hub.repos.get(repo_id)
        if repo is None or not self._sees(repo):
            status = 404 if self.token else 401
            raise Refusal(status, "Repository not found", "RepoNotFound")
        if repo.disabled:
            raise Refusal(403, "Access to this resource is disabled.")
        if self.token and repo_id in self.token.forbidden:
            raise Refusal(403, "the token lacks the permission")
        return repo

    def commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.resolve(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def check_content(self, repo: Repo) -> None:
        """Refuse the files of a gated repo to those who were not let in."""
        if repo.gated and not (self.token and self._is_member(repo)):
            message = f"Access to model {repo.id} is restricted."
            raise Refusal(403 if self.token else 401, message, "GatedRepo")

    def _sees(self, repo: Repo) -> bool:
        return not repo.private or (self.token is not None and self._is_member(repo))

    def _is_member(self, repo: Repo) -> bool:
        assert self.token is not None
        return self.token.user in {repo.owner, *repo.readers, *repo.writers}


Route = Callable[..., Answer]


def whoami(call: Call) -> Answer:
    if call.token is None:
        raise Refusal(401, "Invalid username or password.")
    access = {"accessToken": {"displayName": "test", "role": call.token.role}}
    return as_json({"type": "user", "name": call.token.user, "orgs": [], "auth": access})


def model_info(call: Call, repo_id: str, revision: str = "main") -> Answer:
    repo = call.repo(repo_id)
    commit = call.commit(repo, revision)
    blobs = call.query.get("blobs", "").lower() == "true"
    return as_json(
        {
            "_id": repo.id,
            "id": repo.id,
            "modelId": repo.id,
            "sha": commit.oid,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": repo.disabled,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [_sibling(path, file, blobs) for path, file in commit.files.items()],
        }
    )


def tree(call: Call, repo_id: str, revision: str, folder: str = "") -> Answer:
    repo = call.repo(repo_id)
    commit = call.commit(repo, revision)
    recursive = call.query.get("recursive", "").lower() == "true"
    entries = _tree_entries(commit, folder, recursive)
    if folder and not entries:
        raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
    start = int(call.query.get("cursor", 0))
    stop = start + call.hub.page
    answer = as_json(entries[start:stop])
    if stop < len(entries):
        tail = f"/{quote(folder, safe='')}" if folder else ""
        url = f"{call.hub.endpoint}/api/models/{repo_id}/tree/{quote(revision, safe='')}{tail}"
        answer.headers["Link"] = f'<{url}?recursive={recursive}&cursor={stop}>; rel="next"'
    return answer


def paths_info(call: Call, repo_id: str, revision: str) -> Answer:
    repo = call.repo(repo_id)
    commit = call.commit(repo, revision)
    wanted = parse_qs(call.body.decode())["paths"]
    return as_json([_entry(path, commit.files[path]) for path in wanted if path in commit.files])


def refs(call: Call, repo_id: str) -> Answer:
    repo = call.repo(repo_id)
    named = {
        kind: [
            {"name": name, "ref": f"refs/{where}/{name}", "targetCommit": oid}
            for name, oid in table.items()
        ]
        for kind, where, table in (
            ("branches", "heads", repo.branches),
            ("tags", "tags", repo.tags),
        )
    }
    return as_json({**named, "converts": [], "pullRequests": []})


def commits(call: Call, repo_id: str, revision: str) -> Answer:
    repo = call.repo(repo_id)
    call.commit(repo, revision)
    return as_json(
        [
            {
                "id": commit.oid,
                "title": commit.title,
                "message": "",
                "authors": [{"user": repo.owner}],
                "date": "2026-01-01T00:00:00.000Z",
            }
            for commit in repo.history(revision)
        ]
    )


def auth_check(call: Call, repo_id: str) -> Answer:
    call.check_content(call.repo(repo_id))
    return as_json({})


def auth_check_write(call: Call, repo_id: str) -> Answer:
    repo = call.repo(repo_id)
    token = call.token
    if token is None or token.role != "write" or token.user not in {repo.owner, *repo.writers}:
        raise Refusal(403 if token else 401, "You don't have the rights to write here")
    return as_json({})


def resolve(call: Call, repo_id: str, revision: str, path: str) -> Answer:
    repo = call.repo(repo_id)
    call.check_content(repo)
    commit = call.commit(repo, revision)
    file = commit.files.get(path)
    if file is None:
        raise Refusal(404, f"{path} not found", "EntryNotFound")
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"'}
    if not file.lfs:
        return Answer(200, headers, file.blob, ranged=True)
    call.hub.blobs[file.blob.sha256] = file.blob
    headers |= {
        "X-Linked-Size": str(file.size),
        "X-Linked-ETag": f'"{file.etag}"',
        "Location": f"{call.hub.storage}/blobs/{file.blob.sha256}",
    }
    return Answer(302, headers, Bytes(b"Found. Redirecting"))


READING: tuple[tuple[str, str, Route], ...] = (
    ("GET", r"/api/whoami-v2", whoami),
    ("GET", r"/api/models/(?P<repo_id>{id})/auth-check", auth_check),
    ("GET", r"/api/models/(?P<repo_id>{id})/auth-check/write", auth_check_write),
    ("GET", r"/api/models/(?P<repo_id>{id})/refs", refs),
    ("GET", r"/api/models/(?P<repo_id>{id})/commits/(?P<revision>{s})", commits),
    ("GET", r"/api/models/(?P<repo_id>{id})/revision/(?P<revision>{s})", model_info),
    ("GET", r"/api/models/(?P<repo_id>{id})/tree/(?P<revision>{s})(?:/(?P<folder>.+))?", tree),
    ("POST", r"/api/models/(?P<repo_id>{id})/paths-info/(?P<revision>{s})", paths_info),
    ("GET", r"/api/models/(?P<repo_id>{id})", model_info),
    ("GET", r"/(?P<repo_id>{id})/resolve/(?P<revision>{s})/(?P<path>.+)", resolve),
)


def _sibling(path: str, file: File, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": path}
    lfs = {"sha256": file.blob.sha256, "size": file.size, "pointerSize": len(file.pointer)}
    sibling = {"rfilename": path, "blobId": file.git_oid, "size": file.size}
    return {**sibling, "lfs": lfs} if file.lfs else sibling


def _entry(path: str, file: File) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "oid": file.git_oid, "size": file.size}
    if not file.lfs:
        return entry
    lfs = {"oid": file.blob.sha256, "size": file.size, "pointerSize": len(file.pointer)}
    return {**entry, "lfs": lfs}


def _tree_entries(commit: Commit, folder: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, file in commit.files.items():
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            name = prefix + "/".join(parts[:depth])
            entries[name] = {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        if recursive or len(parts) == 1:
            entries[path] = _entry(path, file)
    return [entries[path] for path in sorted(entries)]
