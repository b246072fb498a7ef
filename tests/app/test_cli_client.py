"""`pissa delete`, and what `watch` says while nobody works, against the API itself."""

from __future__ import annotations

from contextlib import closing

import pytest
from api_tools import BODY, client_of, served
from cli_tools import environment, pissa

from app.cli.client import NO_WORKER, Track, follow
from app.cli.http import Service
from app.cli.progress import Snapshot
from pissa_core.errors import HubUnavailable, RateLimited, RepoNotFound


class Heard:
    """A display that keeps the labels it was shown; `react` is called with each."""

    def __init__(self, react, on_note=None) -> None:
        self.labels: list[str] = []
        self._react = react
        self._on_note = on_note

    def show(self, snapshot: Snapshot) -> None:
        if snapshot.label not in self.labels:
            self.labels.append(snapshot.label)
            self._react(snapshot.label)

    def note(self, text: str) -> None:
        assert self._on_note is not None, text
        self._on_note(text)


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


def test_whoever_watches_is_told_what_the_job_waits_for(home, make_app, worker):
    api = client_of(make_app())
    job_id = api.post("/v1/jobs", json=BODY).json()["id"]
    worker.prepare(job_id)
    claim = worker.start_shard(job_id)
    worker.tasks.waiting(claim, RateLimited("the Hub takes no more requests"), 30.0)
    notes = []

    def give_up(text: str) -> None:
        notes.append(text)
        worker.tasks.fail(claim, HubUnavailable("it is away", hint="look"), discard=False)

    heard = Heard(lambda label: None, give_up)
    service = Service(home, api_key=None, hub_token=None)
    with closing(service._http):
        job = follow(service, job_id, heard)
    assert notes == ["waiting 30 s: the Hub takes no more requests"]
    assert heard.labels == ["waiting", "failed"]
    assert job["waiting"] is None
    watched = pissa("watch", job_id, env=environment(PISSA_URL=home))
    assert watched.returncode == 1
    assert watched.stderr.endswith(
        f"error[hub_unavailable]: it is away\nhint: look (here: `pissa resume {job_id}`)\n"
    )


def test_a_wait_is_told_again_only_when_it_grows_or_something_was_done():
    track = Track()

    def told(delay_s: float, done: int = 0, message: str | None = "the Hub is away") -> str | None:
        wait = {"code": "any", "message": message, "delay_s": delay_s}
        counts = {"bytes": {"done": done, "total": 9}}
        return track.fresh_pause({"status": "running", "progress": counts, "waiting": wait})

    assert told(0.4) == "waiting: the Hub is away"
    assert [told(delay_s) for delay_s in (0.4, 1.9)] == [None, None]
    assert told(5) == "waiting 5 s: the Hub is away"
    assert [told(delay_s) for delay_s in (5, 0.4, 9)] == [None, None, None]
    assert told(90) == "waiting 1 min 30 s: the Hub is away"
    assert told(5, done=4) == "waiting 5 s: the Hub is away"
    assert told(0, done=4, message=None) == "waiting: a worker was lost, another goes on"
    assert track.fresh_pause({"status": "queued", "waiting": None}) is None


def test_what_was_discarded_is_promised_to_nobody(home, make_app, worker):
    api = client_of(make_app())
    job_id = api.post("/v1/jobs", json=BODY).json()["id"]
    env = environment(PISSA_URL=home)
    worker.prepare(job_id)
    for discard, promise in (
        ((), "goes on from what is sealed"),
        (("--discard",), "begins it anew"),
    ):
        assert pissa("cancel", job_id, *discard, env=env).returncode == 0
        worker.tasks.finish(worker.claim(job_id, "discard"))
        watched = pissa("watch", job_id, env=env)
        assert watched.returncode == 1
        assert watched.stderr.endswith(f"hint: `pissa resume {job_id}` {promise}\n")


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
