"""Plans over REST: made by a worker while the caller waits, with its errors as HTTP's."""

from __future__ import annotations

import threading

import pytest
from api_tools import BODY, client_of
from played import PLAN

from pissa_core.errors import error_from


@pytest.fixture
def api(make_app):
    return client_of(make_app(plan_timeout_s=20.0))


@pytest.fixture
def planning(worker, store):
    """Return a function that, in a thread, takes the next plan request and answers it."""
    threads = []

    def answer(reply):
        def run():
            client = store.connection.client
            while not (keys := client.keys("pissa:job:plan_*:tasks")):
                pause.wait(0.02)
            reply(worker.claim(keys[0].split(":")[2], "plan"))

        pause = threading.Event()
        threads.append(threading.Thread(target=run))
        threads[-1].start()

    yield answer
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_a_plan_is_waited_for(api, worker, planning):
    planning(lambda claim: worker.tasks.finish(claim, PLAN.public()))
    answer = api.post("/v1/plans", json=BODY)
    assert answer.status_code == 200, answer.text
    plan = answer.json()
    assert plan == PLAN.public()
    assert plan["trainable_parameters"] == 3 * 2 * 8
    assert api.get("/v1/jobs").json()["jobs"] == []


@pytest.mark.parametrize(
    ("code", "status"),
    [("repo_not_found", 404), ("gated_repo", 403), ("token_invalid", 401), ("rate_limited", 429),
     ("hub_unavailable", 503), ("header_invalid", 422), ("rank_too_large", 422),
     ("disk_too_small", 422), ("internal", 500)],
)  # fmt: skip
def test_what_the_planner_met_is_told(api, worker, planning, code, status):
    error = error_from(code, "a sentence", hint="try that")
    planning(lambda claim: worker.tasks.fail(claim, error, discard=False))
    answer = api.post("/v1/plans", json=BODY)
    assert answer.status_code == status
    document = answer.json()
    assert (document["code"], document["detail"], document["hint"]) == (
        code, "a sentence", "try that",
    )  # fmt: skip
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    assert ("www-authenticate" in answer.headers) == (status == 401)


def test_without_a_worker_a_plan_times_out_with_a_hint(make_app):
    answer = client_of(make_app(plan_timeout_s=0.2)).post("/v1/plans", json=BODY)
    assert answer.status_code == 504
    assert answer.json()["code"] == "plan_timeout"
    assert answer.json()["hint"]
    assert "retry-after" in answer.headers


def test_a_bad_body_is_refused_at_once(api):
    answer = api.post("/v1/plans", json={"model": "org/name", "pissa": {"rank": -1}})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_config")


def test_a_plan_is_of_a_base_model(api):
    answer = api.post("/v1/plans", json={"kind": "verify", "original": "a/b", "converted": "c/d"})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert answer.json()["errors"] == [
        {"loc": ["body", "kind"], "msg": "it must be 'base-to-pissa' (got 'verify')"}
    ]
