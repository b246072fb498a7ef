"""Jobs over REST, on a real store: submit, look, list, cancel, resume, delete."""

from __future__ import annotations

import time

import pytest
from api_tools import BODY, client_of

TOKEN = "hf_" + "aB3" * 11


@pytest.fixture
def api(make_app):
    return client_of(make_app())


def submit(api, body=BODY, **headers):
    answer = api.post(
        "/v1/jobs", json=body, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )
    assert answer.status_code == 202, answer.text
    return answer.json()


def is_problem(answer, status, code):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json()
    assert document["status"] == status
    assert document["code"] == code
    assert document["detail"]
    assert set(document) >= {"type", "title", "status", "detail", "code", "hint", "errors"}
    return document


def test_a_job_is_accepted_and_found_where_location_says(api):
    answer = api.post("/v1/jobs", json=BODY)
    assert answer.status_code == 202
    assert int(answer.headers["retry-after"]) > 0
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert job["status"] == "queued"
    assert job["request"]["pissa"]["rank"] == 8
    assert job["request"]["pissa"]["svd"]["method"] == "auto"
    assert api.get(answer.headers["location"]).json()["id"] == job["id"]


def test_times_are_utc(api):
    assert submit(api)["created_at"].endswith("Z")


def test_the_same_idempotency_key_and_body_give_the_first_job(api):
    first = api.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "once"})
    again = api.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "once"})
    assert (first.status_code, again.status_code) == (202, 200)
    assert again.headers["location"] == first.headers["location"]
    assert len(api.get("/v1/jobs").json()["jobs"]) == 1


def test_the_same_idempotency_key_with_another_body_is_refused(api):
    submit(api, **{"Idempotency-Key": "once"})
    other = {**BODY, "model": "org/other"}
    answer = api.post("/v1/jobs", json=other, headers={"Idempotency-Key": "once"})
    is_problem(answer, 422, "idempotency_mismatch")


@pytest.mark.parametrize(
    ("body", "code", "place"),
    [
        ({"model": "org/name", "pissa": {"rank": 0}}, "invalid_config", ["body", "pissa", "rank"]),
        ({"model": "org/name", "pisa": {}}, "invalid_request", ["body", "pisa"]),
        ({"model": "a b"}, "invalid_reference", ["body", "model"]),
        ({"model": "/etc"}, "outside_local_root", ["body", "model"]),
        ({"kind": "nonsense", "model": "org/name"}, "invalid_request", ["body", "kind"]),
    ],
)
def test_a_bad_body_is_refused_before_anything_is_stored(api, body, code, place):
    document = is_problem(api.post("/v1/jobs", json=body), 422, code)
    assert document["errors"][0]["loc"] == place
    assert api.get("/v1/jobs").json()["jobs"] == []


def test_malformed_json_is_a_problem(api):
    is_problem(api.post("/v1/jobs", content=b"{"), 422, "invalid_request")


def test_a_large_body_is_not_read(api):
    is_problem(api.post("/v1/jobs", content=b" " * (1 << 20) + b"{}"), 413, "payload_too_large")


def test_jobs_are_listed_newest_first_in_pages(api):
    ids = [submit(api)["id"] for _ in range(5)]
    seen, cursor, pages = [], None, 0
    while pages == 0 or cursor:
        page = api.get(
            "/v1/jobs", params={"limit": 2} | ({"after": cursor} if cursor else {})
        ).json()
        assert len(page["jobs"]) <= 2
        seen += [job["id"] for job in page["jobs"]]
        cursor, pages = page["next"], pages + 1
    assert seen == ids[::-1]


def test_jobs_are_listed_by_status(api):
    kept, cancelled = submit(api)["id"], submit(api)["id"]
    api.post(f"/v1/jobs/{cancelled}/cancel")
    assert [job["id"] for job in api.get("/v1/jobs?status=cancelled").json()["jobs"]] == [cancelled]
    assert [job["id"] for job in api.get("/v1/jobs?status=queued,running").json()["jobs"]] == [kept]


@pytest.mark.parametrize(
    "query", ["status=finished", "status=", "limit=0", "limit=1000", "limit=x"]
)
def test_bad_queries_name_the_parameter(api, query):
    document = is_problem(api.get(f"/v1/jobs?{query}"), 422, "invalid_request")
    assert document["errors"][0]["loc"] == ["query", query.partition("=")[0]]


def test_a_cursor_that_is_none_is_refused(api):
    is_problem(api.get("/v1/jobs?after=nonsense"), 422, "invalid_request")


def test_an_unchanged_job_is_not_sent_again(api):
    path = f"/v1/jobs/{submit(api)['id']}"
    etag = api.get(path).headers["etag"]
    assert etag.startswith('W/"')
    unchanged = api.get(path, headers={"If-None-Match": etag})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    assert unchanged.headers["etag"] == etag
    api.post(f"{path}/cancel")
    changed = api.get(path, headers={"If-None-Match": etag})
    assert changed.status_code == 200
    assert changed.headers["etag"] != etag


def test_time_left_is_no_news_by_itself(api, worker):
    path = f"/v1/jobs/{submit(api)['id']}"
    job_id = path.rpartition("/")[2]
    worker.prepare(job_id)
    claim = worker.start_shard(job_id)
    worker.finish_matrix(claim, 0)
    first = api.get(path)
    time.sleep(0.3)
    again = api.get(path)
    assert first.json()["eta_s"] < again.json()["eta_s"]
    assert first.headers["etag"] == again.headers["etag"]
    worker.finish_matrix(claim, 1)
    assert api.get(path).headers["etag"] != first.headers["etag"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("POST", "/resume"), ("GET", "/events"),
        ("GET", "/manifest"), ("GET", "/files"), ("GET", "/files/config.json"),
    ],
)  # fmt: skip
def test_an_unknown_job_is_not_found(api, method, path):
    is_problem(api.request(method, f"/v1/jobs/job_none{path}"), 404, "not_found")


def test_a_queued_job_is_cancelled_resumed_and_deleted(api):
    path = f"/v1/jobs/{submit(api)['id']}"
    is_problem(api.delete(path), 409, "conflict")
    is_problem(api.post(f"{path}/resume"), 409, "conflict")
    assert api.post(f"{path}/cancel").status_code == 202
    assert api.get(path).json()["status"] == "cancelled"
    again = api.post(f"{path}/cancel", json={"discard": True})
    assert (again.status_code, again.json()["status"]) == (202, "cancelled")
    resumed = api.post(f"{path}/resume")
    assert (resumed.status_code, resumed.json()["status"]) == (202, "queued")
    api.post(f"{path}/cancel")
    gone = api.delete(path)
    assert (gone.status_code, gone.content) == (204, b"")
    is_problem(api.get(path), 404, "not_found")
    assert api.get("/v1/jobs").json()["jobs"] == []


@pytest.mark.parametrize("body", [{"discard": "yes"}, {"throw": True}, []])
def test_a_bad_cancel_body_is_refused(api, body):
    path = f"/v1/jobs/{submit(api)['id']}/cancel"
    is_problem(api.post(path, json=body), 422, "invalid_request")


def test_no_answer_repeats_the_hub_token(api):
    answer = api.post("/v1/jobs", json=BODY, headers={"X-Hub-Token": TOKEN})
    path = answer.headers["location"]
    seen = answer.text + api.get(path).text + api.get("/v1/jobs").text
    seen += api.get(f"{path}/events?after=").text
    seen += api.post(f"/v1/jobs/{TOKEN}/resume", headers={"X-Hub-Token": TOKEN}).text
    seen += api.get(f"/{TOKEN}").text
    seen += api.post("/v1/jobs", json={"model": TOKEN + " "}).text
    seen += api.post("/v1/jobs", json={"model": "org/name", "pissa": {"rank": TOKEN}}).text
    assert TOKEN not in seen
