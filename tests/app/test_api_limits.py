"""What one key may ask for: requests, event streams, waiting jobs, ranks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from api_tools import BODY, client_of
from starlette.testclient import TestClient

from app.errors import TooManyRequests
from app.factory import create_app
from app.limits import WRONG_KEYS_A_MINUTE, Limits
from worker.connect import open_store
from worker.settings import Settings

KEYS = ("key-of-anna", "key-of-bert")


def refused(answer):
    assert answer.status_code == 429, answer.text
    assert answer.json()["code"] == "too_many_requests"
    assert int(answer.headers["retry-after"]) >= 1
    return answer.json()["detail"]


def test_a_key_that_asks_too_often_is_told_to_wait_and_others_are_not(make_app):
    app = make_app(api_keys=KEYS, max_requests_per_minute=3)
    anna, bert = (client_of(app, key) for key in KEYS)
    assert [anna.get("/v1/jobs").status_code for _ in range(3)] == [200] * 3
    assert "more than 3 times within a minute" in refused(anna.get("/v1/jobs"))
    assert bert.get("/v1/jobs").status_code == 200
    assert anna.get("/livez").status_code == 200


def test_zero_sets_no_limit_and_this_machine_alone_has_none(make_app):
    free = client_of(make_app(api_keys=KEYS, max_requests_per_minute=0), KEYS[0])
    local = client_of(make_app(max_requests_per_minute=1))
    for api in (free, local):
        assert {api.get("/v1/jobs").status_code for _ in range(5)} == {200}


def test_guessing_keys_is_slowed_down_and_a_right_key_gets_through(make_app):
    app = make_app(api_keys=KEYS)
    stranger = client_of(app, "guess")
    for _ in range(WRONG_KEYS_A_MINUTE):
        assert stranger.get("/v1/jobs").status_code == 401
    refused(stranger.get("/v1/jobs"))
    assert client_of(app, KEYS[0]).get("/v1/jobs").status_code == 200


def test_no_more_jobs_wait_for_one_key_than_allowed(settings):
    allowed = settings.model_copy(update={"api_keys": KEYS, "max_queued": 2})
    store = open_store(allowed)
    try:
        app = create_app(allowed, store)
        anna, bert = (client_of(app, key) for key in KEYS)
        first = anna.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "one"})
        again = anna.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "one"})
        second = anna.post("/v1/jobs", json=BODY)
        assert [first.status_code, again.status_code, second.status_code] == [202, 200, 202]
        assert "2 jobs are waiting" in refused(anna.post("/v1/jobs", json=BODY))
        assert bert.post("/v1/jobs", json=BODY).status_code == 202
        again = anna.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "one"})
        assert again.status_code == 200, "what was accepted is still told"
        anna.post(f"{second.headers['location']}/cancel")
        assert anna.post("/v1/jobs", json=BODY).status_code == 202
    finally:
        store.close()


def test_a_refused_job_leaves_its_idempotency_key_unused(settings):
    allowed = settings.model_copy(update={"max_queued": 1})
    store = open_store(allowed)
    try:
        api = client_of(create_app(allowed, store))
        first = api.post("/v1/jobs", json=BODY)
        refused(api.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "two"}))
        api.post(f"{first.headers['location']}/cancel")
        other = {**BODY, "model": "org/another"}
        answer = api.post("/v1/jobs", json=other, headers={"Idempotency-Key": "two"})
        assert answer.status_code == 202
    finally:
        store.close()


async def _events() -> AsyncIterator[int]:
    yield 1
    yield 2


def test_open_streams_are_counted_until_they_are_let_go():
    limits = Limits(Settings(max_streams=2))
    first, second = limits.stream("anna", _events()), limits.stream("anna", _events())
    with pytest.raises(TooManyRequests, match="2 event streams are open"):
        limits.stream("anna", _events())
    limits.stream("bert", _events())

    async def drain(events):
        return [item async for item in events]

    assert asyncio.run(drain(first)) == [1, 2]
    del first
    third = limits.stream("anna", _events())
    del second, third
    assert limits.stream("anna", _events())


def test_the_route_of_events_counts_its_streams(make_app, worker):
    app = make_app(max_streams=1)
    api = client_of(app)
    path = api.post("/v1/jobs", json=BODY).headers["location"]
    held = app.state.limits.stream("local", _events())
    stream = {"Accept": "text/event-stream"}
    refused(api.get(f"{path}/events", headers=stream))
    assert api.get(f"{path}/events?after=").status_code == 200, "a page is no stream"
    del held
    api.post(f"{path}/cancel")
    with api.stream("GET", f"{path}/events", headers=stream) as answer:
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"rank": 33}, "pissa.rank"),
        ({"rank_pattern": {"q_proj": 64}}, "pissa.rank_pattern.q_proj"),
    ],
)
@pytest.mark.parametrize("route", ["/v1/jobs", "/v1/plans"])
def test_a_rank_above_the_ceiling_is_refused_at_once(make_app, config, place, route):
    api: TestClient = client_of(make_app(max_rank=32))
    answer = api.post(route, json={**BODY, "pissa": config})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_config")
    assert answer.json()["detail"].startswith(f"{place}: ")
    assert "above 32" in answer.json()["detail"]
    assert answer.json()["errors"][0]["loc"] == ["body", *place.split(".")]
    if route == "/v1/jobs":
        assert api.post(route, json={**BODY, "pissa": {"rank": 32}}).status_code == 202


def test_a_converted_lora_may_have_twice_the_highest_rank(make_app):
    api: TestClient = client_of(make_app(max_rank=32))
    body = {"kind": "pissa-to-lora", "trained": "org/trained"}
    answer = api.post("/v1/jobs", json={**body, "lora": {"rank": 65}})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_config")
    assert "65 is above 64" in answer.json()["detail"]
    assert answer.json()["errors"][0]["loc"] == ["body", "lora", "rank"]
    assert api.post("/v1/jobs", json={**body, "lora": {"rank": 64}}).status_code == 202
    assert api.post("/v1/jobs", json=body).status_code == 202
