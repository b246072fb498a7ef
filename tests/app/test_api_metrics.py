"""What /metrics tells: of jobs and work from the store, of answers from the process."""

from __future__ import annotations

import re
import time
from pathlib import Path

from api_tools import BODY, client_of
from prometheus_client.parser import text_string_to_metric_families

from app.asgi import make_app as make_wired_app
from pissa_core.errors import RepoNotFound


def samples(api) -> dict[tuple[str, ...], float]:
    """Return every sample, by its name and the values of its labels."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(api.get("/metrics").text)
        for sample in family.samples
    }


def submit(api) -> str:
    return api.post("/v1/jobs", json=BODY).json()["id"]


def test_jobs_are_counted_from_their_beginning_to_their_end(make_app, worker, settings):
    api = client_of(make_app())
    done, failed, waiting = submit(api), submit(api), submit(api)
    worker.complete(done, settings.files_dir / done, {})
    worker.fail(failed, RepoNotFound("there is no such repo"))
    found = samples(api)
    assert found["pissa_jobs", "succeeded"] == found["pissa_jobs", "failed"] == 1
    assert found["pissa_jobs", "queued"] == 1
    assert found["pissa_jobs_submitted_total", "base-to-pissa"] == 3
    assert found["pissa_jobs_ended_total", "succeeded"] == 1
    assert found["pissa_failures_total", "repo_not_found"] == 1
    assert found["pissa_matrices_total", "done"] == 3
    assert found["pissa_shards_total", "done"] == 1
    assert found["pissa_bytes_total", "done"] == 292
    assert found["pissa_tasks", "leased"] == 0
    assert found["pissa_tasks", "sent"] == 1
    created = api.get(f"/v1/jobs/{waiting}").json()["created_at"]
    assert 0 <= found["pissa_queue_age_seconds",] <= time.time(), created
    phases = {key[1] for key in found if key[0] == "pissa_phase_seconds_total"}
    assert {"queued", "planning", "shards", "publishing"} <= phases


def test_the_queue_s_age_is_that_of_the_job_that_waits_longest(make_app, store):
    api = client_of(make_app())
    assert samples(api)["pissa_queue_age_seconds",] == 0
    first, second = submit(api), submit(api)
    created = store.get(first).created_at.timestamp()
    before = samples(api)["pissa_queue_age_seconds",]
    assert 0 <= before <= time.time() - created
    api.post(f"/v1/jobs/{first}/cancel")
    younger = samples(api)["pissa_queue_age_seconds",]
    assert younger <= time.time() - store.get(second).created_at.timestamp()
    api.post(f"/v1/jobs/{second}/cancel")
    assert samples(api)["pissa_queue_age_seconds",] == 0


def test_counters_only_grow_and_outlive_the_process_and_the_job(settings, worker):
    with client_of(make_wired_app(settings)) as api:
        job_id = submit(api)
        worker.fail(job_id, RepoNotFound("there is no such repo"))
        before = samples(api)
        assert api.delete(f"/v1/jobs/{job_id}").status_code == 204
    with client_of(make_wired_app(settings)) as api:
        submit(api)
        after = samples(api)
    counters = [key for key in before if key[0].endswith("_total") and "http" not in key[0]]
    assert ("pissa_failures_total", "repo_not_found") in counters
    for key in counters:
        assert after[key] >= before[key], key
    assert after["pissa_jobs_submitted_total", "base-to-pissa"] == 2
    assert after["pissa_jobs", "failed"] == 0


def test_resumed_work_is_told_apart_and_counted_once(make_app, worker):
    api = client_of(make_app())
    job_id = submit(api)
    worker.prepare(job_id)
    claim = worker.start_shard(job_id)
    worker.finish_matrix(claim, 0)
    worker.finish_matrix(claim, 0)
    assert samples(api)["pissa_matrices_total", "done"] == 1
    worker.finish_shard(claim)
    found = samples(api)
    assert found["pissa_matrices_total", "done"] == 3
    assert found["pissa_bytes_total", "done"] == 292


def test_answers_are_counted_by_the_template_of_their_route(make_app):
    api = client_of(make_app())
    job_id = submit(api)
    for path in (job_id, "job_1", "job_2", "job_3"):
        api.get(f"/v1/jobs/{path}")
    api.get("/no/such/route")
    api.get("/web/app.js")
    api.post("/v1/jobs", content=b"[]")
    found = samples(api)
    total = "pissa_http_requests_total"
    assert found[total, "GET", "/v1/jobs/{job_id}", "200"] == 1
    assert found[total, "GET", "/v1/jobs/{job_id}", "404"] == 3
    assert found[total, "POST", "/v1/jobs", "202"] == 1
    assert found[total, "POST", "/v1/jobs", "422"] == 1
    assert found[total, "GET", "/web", "200"] == 1
    assert found[total, "GET", "none", "404"] == 1
    assert found["pissa_http_request_seconds_count", "GET", "/v1/jobs/{job_id}"] == 4
    assert not any(job_id in part for key in found for part in key)


def test_strangers_cannot_make_the_metrics_grow(make_app):
    api = client_of(make_app())

    def knock(index):
        api.get(f"/nothing/{index}")
        api.request(f"X{index}", f"/v1/jobs/{index}")
        return set(samples(api))

    knock(0)
    before = knock(1)
    for index in range(2, 20):
        knock(index)
    assert knock(20) == before


def test_every_metric_is_documented_and_no_other(make_app, store):
    store.connection.call("beat", name="played", record='{"device": "cpu", "queues": []}')
    api = client_of(make_app())
    families = text_string_to_metric_families(api.get("/metrics").text)
    told = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in families
        if not family.name.endswith("_created")
    }
    document = Path(__file__).parents[2] / "docs" / "deploy.md"
    assert set(re.findall(r"`(pissa_\w+[a-z])[`{]", document.read_text())) == told


def test_a_worker_s_peak_is_the_highest_of_its_tasks(make_app, store, worker):
    api = client_of(make_app())
    record = '{"device": "cpu", "queues": []}'
    store.connection.call("beat", name="played", record=record)
    worker.complete(job_id := submit(api), worker.settings.files_dir / job_id, {})
    found = samples(api)
    assert found["pissa_worker_peak_memory_bytes", "played"] == 1000
    assert found["pissa_worker_seen_seconds", "played"] >= 0
    store.connection.call("leave", name="played")
    assert ("pissa_worker_peak_memory_bytes", "played") not in samples(api)
