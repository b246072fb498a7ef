"""Large files: the batch route of the test Hub, and what its storage does with what is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from hub.blobs import Blob
from hub.calls import Answer, Call, Refusal, Route, as_json
from hub.repos import Repo
from hub.uploads import BadUpload, Upload

T = TypeVar("T")


def batch(call: Call, repo_id: str) -> Answer:
    """Say where each large file shall be sent, unless it is there."""
    repo = call.writable(repo_id)
    asked = call.json()
    if asked["operation"] != "upload" or asked.get("hash_algo", "sha256") != "sha256":
        raise Refusal(400, "only uploads with sha256 are known here")
    objects = [_actions(call, repo, one["oid"], one["size"]) for one in asked["objects"]]
    in_parts = any(one["size"] > call.hub.uploads.part_size for one in objects)
    return as_json({"transfer": "multipart" if in_parts else "basic", "objects": objects})


def _actions(call: Call, repo: Repo, oid: str, size: int) -> dict[str, Any]:
    entry = {"oid": oid, "size": size, "authenticated": True}
    if oid in repo.objects:
        return entry
    uploads = call.hub.uploads
    name = uploads.start(repo.id, oid, size)
    verify = {"href": f"{call.hub.endpoint}/{repo.id}.git/info/lfs/verify"}
    urls = [f"{call.hub.storage}/uploads/{name}/{part + 1}" for part in range(uploads[name].parts)]
    if size <= uploads.part_size:
        return {**entry, "actions": {"upload": {"href": urls[0]}, "verify": verify}}
    header = {"chunk_size": str(uploads.part_size)}
    header |= {str(number): url for number, url in enumerate(urls, 1)}
    complete = {"href": f"{call.hub.endpoint}/api/complete_multipart?upload={name}"}
    return {**entry, "actions": {"upload": {**complete, "header": header}, "verify": verify}}


def put_part(call: Call, name: str, part: str) -> Answer:
    """Take in a part; a file of one part is finished with it."""
    upload = _upload(call, name)
    call.seen.subject = upload.oid
    etag = _checked(lambda: upload.receive(int(part), call.body.pieces()))
    if upload.parts == 1:
        _keep(call, name, upload)
    return Answer(200, {"ETag": etag})


def complete(call: Call) -> Answer:
    """Finish a file of several parts."""
    name = call.query.get("upload", "")
    upload = _upload(call, name)
    asked = call.json()
    if [part["partNumber"] for part in asked["parts"]] != list(range(1, upload.parts + 1)):
        raise Refusal(400, "parts are missing")
    _keep(call, name, upload)
    return as_json({"success": True})


def verify(call: Call, repo_id: str) -> Answer:
    repo = call.writable(repo_id)
    asked = call.json()
    blob = repo.objects.get(asked["oid"])
    if blob is None or blob.size != asked["size"]:
        raise Refusal(404, f"the large file {asked['oid']} has not come")
    return as_json({})


def duplicate(call: Call, repo_id: str) -> Answer:
    """Give large files of one repo to another, without their being sent."""
    source = call.repo(repo_id)
    call.check_content(source)
    if not call.hub.cross_repo:
        raise Refusal(404, "no copies across repos here")
    asked = call.json()
    target = call.writable(asked["target"]["name"])
    failed = []
    for one in asked["files"]:
        blob = source.objects.get(one["sha256"])
        if blob is None:
            failed.append({"sha256": one["sha256"], "error": "not in the source repository"})
        else:
            target.objects[one["sha256"]] = blob
    return as_json({"success": [], "failed": failed})


LFS: tuple[tuple[str, str, Route], ...] = (
    ("POST", r"/(?P<repo_id>{id})\.git/info/lfs/objects/batch", batch),
    ("POST", r"/(?P<repo_id>{id})\.git/info/lfs/verify", verify),
    ("POST", r"/api/complete_multipart", complete),
    ("POST", r"/api/models/(?P<repo_id>{id})/lfs-files/duplicate", duplicate),
)


def _upload(call: Call, name: str) -> Upload:
    try:
        return call.hub.uploads[name]
    except KeyError as error:
        raise Refusal(404, "no such upload") from error


def _keep(call: Call, name: str, upload: Upload) -> Blob:
    blob = _checked(lambda: call.hub.uploads.finish(name))
    repo = call.hub.repos.get(upload.repo_id)
    if repo is None:
        raise Refusal(404, "Repository not found", "RepoNotFound")
    repo.objects[upload.oid] = blob
    return blob


def _checked(work: Callable[[], T]) -> T:
    try:
        return work()
    except BadUpload as error:
        raise Refusal(400, str(error)) from error
