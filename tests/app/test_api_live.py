"""The API behind a real socket: streams of events, crowds, a store that goes away."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

import httpx2
import pytest
from api_tools import BODY, client_of, served
from prometheus_client.parser import text_string_to_metric_families

from app.asgi import make_app as make_wired_app
from app.factory import create_app
from pissa_core.errors import RepoNotFound
from worker.connect import open_store
from worker.embedded import answers, embedded_valkey
from worker.settings import Settings


@pytest.fixture
def home(make_app):
    with served(make_app()) as url:
        yield url


def submit(home):
    return httpx2.post(f"{home}/v1/jobs", json=BODY).json()["id"]


def stream(home, job_id, **headers):
    """Read a job's events to the end of the stream."""
    headers = {"Accept": "text/event-stream", **headers}
    answer = httpx2.get(f"{home}/v1/jobs/{job_id}/events", headers=headers, timeout=30)
    return answer, list(messages(answer.text))


def messages(text):
    for block in text.replace("\r\n", "\n").split("\n\n"):
        fields = dict(
            line.split(": ", 1) for line in block.splitlines() if not line.startswith(":")
        )
        if fields:
            yield fields


def test_a_job_is_followed_to_its_end(home, worker, settings):
    job_id = submit(home)
    done = threading.Thread(
        target=worker.complete, args=(job_id, settings.files_dir / job_id, {"a": b"1"})
    )
    done.start()
    answer, seen = stream(home, job_id)
    done.join()
    assert answer.headers["content-type"].startswith("text/event-stream")
    types = [fields["event"] for fields in seen]
    assert types == [
        "queued", "started", "planned", "shard_started", "matrix_done", "matrix_done",
        "matrix_done", "shard_done", "succeeded",
    ]  # fmt: skip
    for fields in seen:
        event = json.loads(fields["data"])
        assert (event["id"], event["type"]) == (fields["id"], fields["event"])
        assert event["at"].endswith("Z")


def test_a_stream_goes_on_after_the_last_id_seen(home, worker, settings):
    job_id = submit(home)
    worker.complete(job_id, settings.files_dir / job_id, {})
    _, everything = stream(home, job_id)
    _, rest = stream(home, job_id, **{"Last-Event-ID": everything[3]["id"]})
    assert rest == everything[4:]


def test_a_browser_is_told_not_to_come_back(home, worker):
    job_id = submit(home)
    worker.fail(job_id, RepoNotFound("there is no such repo"))
    _, everything = stream(home, job_id)
    assert everything[-1]["event"] == "failed"
    again, nothing = stream(home, job_id, **{"Last-Event-ID": everything[-1]["id"]})
    assert (again.status_code, nothing) == (204, [])


def test_a_resumed_job_is_followed_past_its_first_end(home, worker):
    job_id = submit(home)
    httpx2.post(f"{home}/v1/jobs/{job_id}/cancel")
    httpx2.post(f"{home}/v1/jobs/{job_id}/resume")
    worker.fail(job_id, RepoNotFound("there is no such repo"))
    _, seen = stream(home, job_id)
    assert [fields["event"] for fields in seen] == [
        "queued", "cancelling", "cancelled", "resumed", "started", "failed",
    ]  # fmt: skip


def test_events_come_as_json_in_pages(home, worker, settings):
    job_id = submit(home)
    worker.complete(job_id, settings.files_dir / job_id, {})
    url = f"{home}/v1/jobs/{job_id}/events"
    first = httpx2.get(url, params={"after": "", "limit": 4}).json()
    rest = httpx2.get(url, params={"after": first["next"]}).json()
    assert len(first["events"]) == 4
    assert rest["next"] is None
    _, streamed = stream(home, job_id)
    together = first["events"] + rest["events"]
    assert [event["id"] for event in together] == [fields["id"] for fields in streamed]
    whole = httpx2.get(url, headers={"Accept": "application/json"}).json()
    assert whole["events"] == together


def test_a_quiet_job_is_followed_patiently(home, worker):
    job_id = submit(home)
    # Longer than a client of the store waits for an answer unless told otherwise.
    late = threading.Timer(6, worker.fail, (job_id, RepoNotFound("there is no such repo")))
    late.start()
    _, seen = stream(home, job_id)
    late.join()
    assert seen[-1]["event"] == "failed"


@pytest.mark.parametrize("cursor", ["yesterday", "9" * 20, "1-2-3", "-1", "٣"])
def test_a_bad_cursor_is_refused(home, cursor):
    job_id = submit(home)
    answer = httpx2.get(f"{home}/v1/jobs/{job_id}/events", params={"after": cursor})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


def test_fifty_streams_and_a_crowd_of_waiting_plans_leave_room_for_others(make_app, worker):
    async def crowd(home):
        limits = httpx2.Limits(max_connections=200)
        async with httpx2.AsyncClient(base_url=home, limits=limits, timeout=60) as client:
            job_id = (await client.post("/v1/jobs", json=BODY)).json()["id"]
            path = f"/v1/jobs/{job_id}"
            accept = {"Accept": "text/event-stream"}
            streams = [
                asyncio.create_task(client.get(f"{path}/events", headers=accept)) for _ in range(50)
            ]
            plans = [asyncio.create_task(client.post("/v1/plans", json=BODY)) for _ in range(40)]
            await asyncio.sleep(0.5)
            answers = await asyncio.gather(*(client.get(path) for _ in range(100)))
            assert {answer.status_code for answer in answers} == {200}
            assert not any(task.done() for task in streams)
            await asyncio.to_thread(worker.fail, job_id, RepoNotFound("no such repo"))
            for answer in await asyncio.gather(*streams):
                assert [fields["event"] for fields in messages(answer.text)][-1] == "failed"
            return [answer.status_code for answer in await asyncio.gather(*plans)]

    with served(make_app(plan_timeout_s=2.0)) as home:
        statuses = asyncio.run(crowd(home))
    assert set(statuses) <= {504, 429}
    assert 504 in statuses


def raw(home, request):
    """Send bytes as they are, and return the answer's status line and all."""
    address = urlsplit(home)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(request)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


def test_dots_in_a_raw_path_lead_nowhere(home, worker, settings):
    job_id = submit(home)
    worker.complete(job_id, settings.files_dir / job_id, {"config.json": b"{}"})
    for path in (
        "../../valkey/valkey.conf",
        "../../../data/valkey/valkey.conf",
        "x/../config.json",
    ):
        request = f"GET /v1/jobs/{job_id}/files/{path} HTTP/1.1\r\nHost: localhost\r\n"
        answer = raw(home, f"{request}Connection: close\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 404"), path


def test_an_endless_body_is_cut_off(home):
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    head = b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    # Never ended by the client: an answer comes only if the service stops reading by itself.
    address = urlsplit(home)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(head + chunk * 17)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")


def test_readiness_and_metrics_tell_of_jobs_and_workers(home, worker, store):
    kept, cancelled = submit(home), submit(home)
    httpx2.post(f"{home}/v1/jobs/{cancelled}/cancel")
    ready = httpx2.get(f"{home}/readyz")
    assert (ready.status_code, ready.json()["store"]) == (200, "ok")
    text = httpx2.get(f"{home}/metrics").text
    values = {
        (sample.name, sample.labels.get("status")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert values["pissa_jobs", "queued"] == 1
    assert values["pissa_jobs", "cancelled"] == 1
    age = values["pissa_queue_age_seconds", None]
    passed = time.time() - store.get(kept).created_at.timestamp()
    assert 0 <= age <= passed


def test_while_the_store_is_away_the_api_says_so(tmp_path):
    with embedded_valkey(tmp_path / "data") as url:
        settings = Settings(redis_url=url, data_dir=tmp_path / "data")
        store = open_store(settings, patience_s=0.2)
        api = client_of(create_app(settings, store))
        assert api.get("/readyz").status_code == 200
    ready = api.get("/readyz")
    assert ready.status_code == 503
    assert ready.json() | {"detail": "", "hint": ""} == {
        "type": "about:blank", "title": "Service Unavailable", "status": 503, "detail": "",
        "code": "store_unavailable", "hint": "", "errors": [], "store": "away", "workers": [],
    }  # fmt: skip
    for method, path in [("GET", "/v1/jobs"), ("GET", "/v1/jobs/x"), ("GET", "/metrics")]:
        answer = api.request(method, path)
        assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable"), path
        assert "retry-after" in answer.headers
    assert api.post("/v1/jobs", json=BODY).status_code == 503
    assert api.get("/livez").status_code == 200
    store.close()


@pytest.mark.parametrize("embedded", [True, False])
def test_the_wired_app_opens_and_closes_its_store(tmp_path, store_url, embedded):
    folder = tmp_path / "own"
    settings = Settings(data_dir=folder, redis_url=None if embedded else store_url)
    with client_of(make_wired_app(settings)) as api:
        assert api.post("/v1/jobs", json=BODY).status_code == 202
        assert (folder / "valkey").exists() == embedded
    with client_of(make_wired_app(settings)) as api:
        assert len(api.get("/v1/jobs").json()["jobs"]) == 1


def test_a_signal_ends_the_server_with_streams_open(tmp_path):
    environment = os.environ | {"PISSA_DATA_DIR": str(tmp_path / "data")}
    command = [sys.executable, "-m", "uvicorn", "app.asgi:app", "--port", "0"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            told = (re.search(r"running on (http://[0-9.:]+)", line) for line in server.stderr)
            home = next(match[1] for match in told if match)
            with httpx2.stream("GET", f"{home}/v1/jobs/{submit(home)}/events") as answer:
                assert next(answer.iter_lines()).startswith("id: ")
                server.send_signal(signal.SIGTERM)
                assert server.wait(30) in (0, -signal.SIGTERM)
        finally:
            server.kill()
    assert not answers(f"unix://{tmp_path / 'data' / 'valkey' / 'valkey.sock'}")
