"""What came out of a job: manifest, list of files, downloads by range, and nothing besides."""

from __future__ import annotations

import hashlib

import pytest
from api_tools import BODY, client_of
from played import MATRICES

FILES = {
    "config.json": b'{"architectures": []}',
    "model.safetensors": bytes(range(256)) * 40,
    "pissa_init/adapter_config.json": b"{}",
    "a b/ü#?.txt": b"odd name",
    "empty.txt": b"",
}


@pytest.fixture
def api(make_app):
    return client_of(make_app())


@pytest.fixture
def done(api, worker, settings):
    """The path of a job that succeeded, its files kept by the service."""
    job = api.post("/v1/jobs", json=BODY).json()
    worker.complete(job["id"], settings.files_dir / job["id"], FILES)
    return f"/v1/jobs/{job['id']}"


def code_of(answer):
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    return answer.status_code, answer.json()["code"]


def test_a_succeeded_job_tells_its_result(api, done):
    job = api.get(done).json()
    assert (job["status"], job["phase"]) == ("succeeded", "done")
    assert job["progress"]["matrices"] == {"done": 3, "total": 3}
    assert job["result"]["energy"] == 0.75
    assert code_of(api.post(f"{done}/cancel")) == (409, "conflict")
    assert code_of(api.post(f"{done}/resume")) == (409, "conflict")


def test_the_manifest_grows_with_the_job(api, worker, settings):
    job = api.post("/v1/jobs", json=BODY).json()
    path = f"/v1/jobs/{job['id']}/manifest"
    early = api.get(path).json()
    assert (early["schema"], early["kind"], early["matrices"]) == (1, "base-to-pissa", [])
    worker.prepare(job["id"])
    claim = worker.start_shard(job["id"])
    worker.finish_matrix(claim, 1)
    partial = api.get(path).json()
    assert [row["tensor"] for row in partial["matrices"]] == [MATRICES[1].tensor]
    assert partial["source"]["commit"] == "0" * 40
    assert partial["files"] == {}


def test_the_manifest_of_a_succeeded_job_is_the_published_one(api, done):
    manifest = api.get(f"{done}/manifest").json()
    assert set(manifest["files"]) == set(FILES)
    assert len(manifest["matrices"]) == 3
    published = api.get(f"{done}/files/pissa_manifest.json").json()
    assert published == manifest


def test_every_file_is_listed_with_its_checksum(api, done):
    listed = {entry["path"]: entry for entry in api.get(f"{done}/files").json()["files"]}
    assert set(listed) == {*FILES, "pissa_manifest.json"}
    for path, entry in listed.items():
        content = api.get(f"{done}/files/{path.replace('#', '%23').replace('?', '%3F')}").content
        assert entry["size"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert FILES.get(path, content) == content


def test_a_file_is_never_shown_in_place(api, done):
    headers = api.get(f"{done}/files/config.json").headers
    assert headers["content-disposition"].startswith("attachment")
    assert headers["content-type"] == "application/octet-stream"


def test_a_file_s_etag_is_its_checksum(api, done):
    path = f"{done}/files/model.safetensors"
    etag = api.get(path).headers["etag"]
    assert etag == f'"{hashlib.sha256(FILES["model.safetensors"]).hexdigest()}"'
    unchanged = api.get(path, headers={"If-None-Match": etag})
    assert (unchanged.status_code, unchanged.content) == (304, b"")


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ("bytes=0-99", slice(0, 100)), ("bytes=10000-", slice(10000, None)),
        ("bytes=-5", slice(-5, None)), ("bytes=10200-99999", slice(10200, None)),
    ],
)  # fmt: skip
def test_a_range_is_sent(api, done, header, part):
    whole = FILES["model.safetensors"]
    answer = api.get(f"{done}/files/model.safetensors", headers={"Range": header})
    assert answer.status_code == 206
    assert answer.content == whole[part]
    start = range(len(whole))[part].start
    expected = f"bytes {start}-{start + len(answer.content) - 1}/{len(whole)}"
    assert answer.headers["content-range"] == expected


@pytest.mark.parametrize("header", ["bytes=5-2", "lines=1-2", "bytes=0-1,5-6", "nonsense"])
def test_what_is_no_range_gives_the_whole_file(api, done, header):
    answer = api.get(f"{done}/files/model.safetensors", headers={"Range": header})
    assert (answer.status_code, answer.content) == (200, FILES["model.safetensors"])


@pytest.mark.parametrize(
    ("name", "header"), [("config.json", "bytes=99-"), ("empty.txt", "bytes=0-")]
)
def test_a_range_behind_the_end_is_refused(api, done, name, header):
    answer = api.get(f"{done}/files/{name}", headers={"Range": header})
    assert code_of(answer) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{len(FILES[name])}"


def test_a_changed_file_is_sent_whole(api, done):
    headers = {"Range": "bytes=0-1", "If-Range": '"another"'}
    answer = api.get(f"{done}/files/config.json", headers=headers)
    assert (answer.status_code, answer.content) == (200, FILES["config.json"])


def test_head_tells_the_size(api, done):
    answer = api.head(f"{done}/files/model.safetensors")
    assert (answer.status_code, answer.content) == (200, b"")
    assert int(answer.headers["content-length"]) == len(FILES["model.safetensors"])


@pytest.mark.parametrize(
    "path",
    [
        "nothing.txt", "..%2F..%2Fvalkey%2Fvalkey.conf", "%2e%2e/x",
        "/etc/passwd", "%2Fetc%2Fpasswd", "pissa_init", "", "a%00b",
        "pissa_init/%2E%2E/config.json", "x" * 3000, "..\\x",
    ],
)  # fmt: skip
def test_nothing_else_can_be_reached(api, done, settings, path):
    assert (settings.data_dir / "valkey" / "valkey.conf").exists()
    assert code_of(api.get(f"{done}/files/{path}"))[0] == 404


def test_a_symlink_out_of_the_result_is_not_followed(api, done, settings, tmp_path):
    (tmp_path / "secret").write_text("secret")
    folder = settings.files_dir / done.rpartition("/")[2]
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "secret")
    assert code_of(api.get(f"{done}/files/config.json")) == (404, "not_found")


def test_a_file_that_has_gone_is_not_found(api, done, settings):
    (settings.files_dir / done.rpartition("/")[2] / "config.json").unlink()
    assert code_of(api.get(f"{done}/files/config.json")) == (404, "not_found")


def test_files_of_a_local_output_are_served_from_there(api, worker, local_root):
    job = api.post("/v1/jobs", json={**BODY, "output": "./out"}).json()
    worker.complete(job["id"], local_root / "out", FILES)
    answer = api.get(f"/v1/jobs/{job['id']}/files/config.json")
    assert answer.content == FILES["config.json"]


def test_files_on_the_hub_are_listed_and_not_ours_to_send(api, worker, tmp_path):
    job = api.post("/v1/jobs", json={**BODY, "output": "hf://me/name"}).json()
    worker.complete(job["id"], tmp_path / "elsewhere", FILES)
    listed = api.get(f"/v1/jobs/{job['id']}/files").json()["files"]
    assert {entry["path"] for entry in listed} == set(FILES)
    answer = api.get(f"/v1/jobs/{job['id']}/files/config.json")
    assert code_of(answer) == (404, "not_found")
    assert str(tmp_path / "elsewhere") in answer.json()["detail"]


def test_without_the_local_root_its_files_are_out_of_reach(api, make_app, worker, local_root):
    job = api.post("/v1/jobs", json={**BODY, "output": "./out"}).json()
    worker.complete(job["id"], local_root / "out", FILES)
    path = f"/v1/jobs/{job['id']}/files/config.json"
    assert api.get(path).status_code == 200
    assert code_of(client_of(make_app(local_root=None)).get(path)) == (404, "not_found")


def test_an_unfinished_job_has_no_files(api):
    job = api.post("/v1/jobs", json=BODY).json()
    assert code_of(api.get(f"/v1/jobs/{job['id']}/files")) == (409, "conflict")
    assert code_of(api.get(f"/v1/jobs/{job['id']}/files/config.json")) == (409, "conflict")


def test_deleting_a_job_deletes_its_kept_files(api, done, settings):
    assert api.delete(done).status_code == 204
    assert not (settings.files_dir / done.rpartition("/")[2]).exists()
    assert code_of(api.get(f"{done}/files")) == (404, "not_found")
