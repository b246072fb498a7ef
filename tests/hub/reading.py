"""The reading routes of the test Hub: what the real one answers, and to whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, quote

from hub.blobs import Bytes
from hub.calls import Answer, Call, Refusal, Route, as_json
from hub.repos import Commit, File, Repo


def whoami(call: Call) -> Answer:
    if call.token is None:
        raise Refusal(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": name} for name in sorted(call.token.orgs)]
    access = {"accessToken": {"displayName": "test", "role": call.token.role}}
    return as_json({"type": "user", "name": call.token.user, "orgs": orgs, "auth": access})


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
    expand = call.query.get("expand", "").lower() == "true"
    entries = _tree_entries(_Entries(call, repo, commit, expand), folder, recursive)
    if folder and not entries:
        raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
    start = int(call.query.get("cursor", 0))
    stop = start + call.hub.page
    answer = as_json(entries[start:stop])
    if stop < len(entries):
        tail = f"/{quote(folder, safe='')}" if folder else ""
        url = f"{call.hub.endpoint}/api/models/{repo_id}/tree/{quote(revision, safe='')}{tail}"
        query = f"recursive={recursive}&expand={expand}&cursor={stop}"
        answer.headers["Link"] = f'<{url}?{query}>; rel="next"'
    return answer


def paths_info(call: Call, repo_id: str, revision: str) -> Answer:
    repo = call.repo(repo_id)
    commit = call.commit(repo, revision)
    asked = parse_qs(call.body.read().decode())
    expand = asked.get("expand", ["false"])[-1].lower() == "true"
    entries = _Entries(call, repo, commit, expand)
    return as_json([entries.file(path) for path in asked["paths"] if path in commit.files])


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
                "date": commit.date,
            }
            for commit in repo.history(revision)
        ]
    )


def auth_check(call: Call, repo_id: str) -> Answer:
    call.check_content(call.repo(repo_id))
    return as_json({})


def auth_check_write(call: Call, repo_id: str) -> Answer:
    call.writable(repo_id)
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
        call.seen.subject = f"{repo_id}/{path}"
        return Answer(200, headers, file.blob, ranged=True)
    call.hub.blobs[file.blob.sha256] = file.blob
    name = quote(f"{repo_id}/{path}")
    headers |= {
        "X-Linked-Size": str(file.size),
        "X-Linked-ETag": f'"{file.etag}"',
        "Location": f"{call.hub.storage}/blobs/{file.blob.sha256}?file={name}",
    }
    return Answer(302, headers, Bytes(b"Found. Redirecting"))


def counts(call: Call) -> Answer:
    """Say what went by so far; no route of the real Hub."""
    return as_json(call.hub.counts())


READING: tuple[tuple[str, str, Route], ...] = (
    ("GET", r"/_counts", counts),
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


@dataclass(frozen=True)
class _Entries:
    """What a tree says of each file of a commit."""

    call: Call
    repo: Repo
    commit: Commit
    expand: bool

    def file(self, path: str) -> dict[str, Any]:
        file = self.commit.files[path]
        entry = {"type": "file", "path": path, "oid": file.git_oid, "size": file.size}
        if file.lfs:
            lfs = {"oid": file.blob.sha256, "size": file.size, "pointerSize": len(file.pointer)}
            entry["lfs"] = lfs
            if self.call.hub.cross_repo:
                # The client copies across repos by this name; here any will do.
                entry["xetHash"] = file.blob.sha256[::-1]
        if self.expand:
            last = self._last_commit(path)
            entry["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
        return entry

    def _last_commit(self, path: str) -> Commit:
        """Return the commit that brought the file as it is."""
        last = self.commit
        for earlier in self.repo.history(self.commit.oid):
            if (file := earlier.files.get(path)) is None or file.etag != last.files[path].etag:
                break
            last = earlier
        return last


def _tree_entries(of: _Entries, folder: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for path in of.commit.files:
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            name = prefix + "/".join(parts[:depth])
            entries[name] = {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        if recursive or len(parts) == 1:
            entries[path] = of.file(path)
    return [entries[path] for path in sorted(entries)]
