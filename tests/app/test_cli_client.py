"""`pissa delete`, and what `watch` says while nobody works, against the API itself."""

from __future__ import annotations

from contextlib import closing

import pytest
from api_tools import BODY, client_of, served
from cli_tools import environment, pissa

from app.cli.client import NO_WORKER, follow
from app.cli.http import Service
from app.cli.progress import Snapshot
from pissa_core.errors import RepoNotFound


class Heard:
    """A display that keeps the labels it was shown; `react` is called with each."""

    def __init__(self, react) -> None:
        self.labels: list[str] = []
        self._react = react

    def show(self, snapshot: Snapshot) -> None:
        if snapshot.label not in self.labels:
            self.labels.append(snapshot.label)
            self._react(snapshot.label)

    def note(self, text: str) -> None:
        raise AssertionError(text)


@pytest.fixture
def home(make_app):
    with served(make_app()) as url:
        yield url


def test_an_ended_job_is_deleted_and_a_running_one_is_not(home, make_app, worker):
    api = client_of(make_app())
    job_id = api.post("/v1/jobs", json=BODY).json()["id"]
    env = environment(PISSA_URL=home)
    refused = pissa("delete", job_id, env=env)
    assert refused.returncode == 1
    assert "error[conflict]" in refused.stderr
    assert "hint: cancel it first" in refused.stderr
    api.post(f"/v1/jobs/{job_id}/cancel")
    done = pissa("delete", job_id, env=env)
    assert (done.returncode, done.stdout) == (0, f"{job_id}  deleted\n"), done.stderr
    assert api.get(f"/v1/jobs/{job_id}").status_code == 404
    again = pissa("delete", job_id, env=env)
    assert again.returncode == 1
    assert "error[not_found]" in again.stderr


def test_whoever_watches_is_told_that_nobody_works(home, make_app, worker, store):
    api = client_of(make_app())
    job_id = api.post("/v1/jobs", json=BODY).json()["id"]

    def go_on(label: str) -> None:
        if label == NO_WORKER:
            record = '{"device": "cpu", "queues": []}'
            store.connection.call("beat", name="played", record=record)
        elif label == "queued":
            worker.fail(job_id, RepoNotFound("there is no such repo"))

    heard = Heard(go_on)
    service = Service(home, api_key=None, hub_token=None)
    with closing(service._http):
        assert follow(service, job_id, heard)["status"] == "failed"
    assert heard.labels == [NO_WORKER, "queued", "failed"]
