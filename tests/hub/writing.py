"""The writing routes of the test Hub: repos, branches and commits."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from hub.blobs import Bytes
from hub.calls import Answer, Call, Refusal, Route, as_json
from hub.repos import File, Repo, is_large

_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


def create_repo(call: Call) -> Answer:
    if call.token is None:
        raise Refusal(401, "Invalid username or password.")
    asked = call.json()
    owner = asked.get("organization") or call.token.user
    repo_id = f"{owner}/{asked['name']}"
    url = f"{call.hub.endpoint}/{repo_id}"
    with call.hub.lock:
        if repo_id in call.hub.repos:
            return as_json({"error": "You already created this model repo", "url": url}, 409)
        if owner not in {call.token.user, *call.token.orgs} or not call.token.may_write(repo_id):
            message = f'You don\'t have the rights to create a model under the namespace "{owner}"'
            raise Refusal(403, message)
        repo = call.hub.create_repo(repo_id, files={".gitattributes": _ATTRIBUTES})
        repo.private = asked.get("visibility") == "private" or bool(asked.get("private"))
    return as_json({"url": url, "name": repo_id, "id": repo_id})


def delete_repo(call: Call) -> Answer:
    asked = call.json()
    if call.token is None:
        raise Refusal(401, "Invalid username or password.")
    repo = call.writable(f"{asked.get('organization') or call.token.user}/{asked['name']}")
    del call.hub.repos[repo.id]
    return as_json({})


def create_branch(call: Call, repo_id: str, branch: str) -> Answer:
    repo = call.writable(repo_id)
    start = (call.json() or {}).get("startingPoint") or "main"
    if branch.startswith("refs/"):
        raise Refusal(400, f"Invalid reference for a branch: {branch}")
    with call.hub.lock:
        if branch in repo.branches:
            raise Refusal(409, f"Reference {branch} already exists")
        repo.branches[branch] = call.commit(repo, start).oid
    return as_json({}, 201)


def delete_branch(call: Call, repo_id: str, branch: str) -> Answer:
    repo = call.writable(repo_id)
    if branch == "main":
        raise Refusal(403, "the branch main is protected")
    with call.hub.lock:
        if repo.branches.pop(branch, None) is None:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    return as_json({})


def validate_yaml(call: Call) -> Answer:
    errors = _card_errors(call.json()["content"])
    return as_json({"errors": errors, "warnings": []}, 400 if errors else 200)


def preupload(call: Call, repo_id: str, revision: str) -> Answer:
    """Say of each file whether it goes into git or to the storage of large files."""
    repo = call.writable(repo_id)
    there = call.commit(repo, revision).files
    answers = []
    for asked in call.json()["files"]:
        path, sample = asked["path"], base64.b64decode(asked["sample"])
        large = is_large(path, asked["size"]) or b"\0" in sample
        known = there.get(path)
        answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        answers.append({**answer, "oid": known.etag} if known else answer)
    return as_json({"files": answers})


def commit(call: Call, repo_id: str, revision: str) -> Answer:
    """Apply lines of operations to a branch, all of them or none."""
    repo = call.writable(repo_id)
    branch = revision.removeprefix("refs/heads/")
    lines = [json.loads(line) for line in call.body.read().splitlines() if line.strip()]
    header = next((line["value"] for line in lines if line["key"] == "header"), None)
    if header is None or not header.get("summary"):
        raise Refusal(400, "a commit needs a summary")
    with call.hub.lock:
        if branch not in repo.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        head = repo.branches[branch]
        if header.get("parentCommit", head) != head:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        changes = _changes(repo, repo.commits[head].files, lines)
        made = repo.commit(changes, branch=branch, title=header["summary"])
        call.hub.commits.append((repo_id, branch))
    url = f"{call.hub.endpoint}/{repo_id}/commit/{made.oid}"
    return as_json({"success": True, "commitUrl": url, "commitOid": made.oid})


WRITING: tuple[tuple[str, str, Route], ...] = (
    ("POST", r"/api/repos/create", create_repo),
    ("DELETE", r"/api/repos/delete", delete_repo),
    ("POST", r"/api/models/(?P<repo_id>{id})/branch/(?P<branch>{s})", create_branch),
    ("DELETE", r"/api/models/(?P<repo_id>{id})/branch/(?P<branch>{s})", delete_branch),
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("POST", r"/api/models/(?P<repo_id>{id})/preupload/(?P<revision>{s})", preupload),
    ("POST", r"/api/models/(?P<repo_id>{id})/commit/(?P<revision>{s})", commit),
)


def _changes(
    repo: Repo, there: Mapping[str, File], lines: list[dict[str, Any]]
) -> dict[str, File | None]:
    """Return each path's new file, or None where it goes."""
    changes: dict[str, File | None] = {}
    for line in lines:
        key, value = line["key"], line["value"]
        if key == "header":
            continue
        path = value["path"]
        if {"", ".", "..", ".git"} & set(path.rstrip("/").split("/")):
            raise Refusal(400, f"the path {path!r} is not allowed")
        if key == "file":
            changes[path] = _small(path, value)
        elif key == "lfsFile":
            changes[path] = _large(repo, path, value)
        elif key in ("deletedFile", "deletedFolder"):
            prefix = path.rstrip("/") + "/"
            gone = [
                p for p in there if (p == path if key == "deletedFile" else p.startswith(prefix))
            ]
            if not gone:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            changes.update(dict.fromkeys(gone))
        else:
            raise Refusal(400, f"unknown operation {key!r}")
    return changes


def _small(path: str, value: dict[str, Any]) -> File:
    try:
        content = base64.b64decode(value["content"], validate=True)
    except binascii.Error as error:
        raise Refusal(400, f"the content of {path} is no base64") from error
    if is_large(path, len(content)) and content:
        raise Refusal(400, f"{path} must be sent to the storage of large files")
    if path == "README.md" and (errors := _card_errors(content.decode())):
        raise Refusal(400, errors[0]["message"])
    return File(Bytes(content), lfs=False)


def _large(repo: Repo, path: str, value: dict[str, Any]) -> File:
    blob = repo.objects.get(value["oid"])
    if blob is None or value.get("size", blob.size) != blob.size:
        raise Refusal(400, f"LFS pointer of {path} points to a file that does not exist")
    return File(blob, lfs=True)


def _card_errors(content: str) -> list[dict[str, str]]:
    """Return what is wrong with the YAML block of a model card."""
    if not content.startswith("---"):
        return []
    try:
        metadata = yaml.safe_load(content.split("---", 2)[1])
    except yaml.YAMLError as error:
        return [{"message": f"the metadata is no YAML: {error}"}]
    if metadata is not None and not isinstance(metadata, dict):
        return [{"message": "the metadata must be a mapping"}]
    return [{"message": message} for message in _refused(metadata or {})]


def _refused(metadata: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the Hub says of values that are not of its vocabulary, in its words."""
    for license in _texts(metadata.get("license")):
        if not re.fullmatch(r"[a-z0-9.+-]+", license):
            yield '"license" must be one of [apache-2.0, mit, openrail, other, unknown, …]'
    for language in _texts(metadata.get("language")):
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual", language):
            yield f'"language" with value "{language}" is not valid. It must be an ISO 639-1 code'
    for base in _texts(metadata.get("base_model")):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+|[\w.-]+", base):
            yield f'"base_model" with value "{base}" is not valid. Use a model id'
    for index, tag in enumerate(_texts(metadata.get("tags"))):
        if len(tag) > 64:
            yield f'"tags[{index}]" length must be less than or equal to 64 characters long'


def _texts(value: Any) -> list[str]:
    return value if isinstance(value, list) else [] if value is None else [str(value)]
