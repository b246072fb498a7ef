"""Plays one round: jobs come, faults happen, everything ends, and nothing may be amiss."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from client import FINAL, Client, Follower
from comparing import Outcome, clear, outcome_of
from faults import inflict
from household import Household
from recipes import Recipe
from script import Part, Script
from traces import Traces
from worker_tools import wait_for

END_S = 240.0
SETTLE_S = 60.0


@dataclass
class Running:
    """A job of the round that was accepted."""

    part: Part
    job_id: str
    follower: Follower
    cancelled: bool = False
    resumed: bool = False
    ended: bool = False

    @property
    def recipe(self) -> Recipe:
        return self.part.recipe


@dataclass
class Round:
    """One script on one service."""

    home: Household
    client: Client
    script: Script
    undisturbed: Mapping[str, Outcome]
    traces: Traces
    running: list[Running] = field(default_factory=list)

    @property
    def broken(self) -> int:
        """How often streams of events broke off and were taken up again."""
        return sum(job.follower.broken for job in self.running)

    def play(self) -> None:
        """Play the script, wait for the end of every job, and look at everything."""
        began = time.monotonic()
        jobs, faults = list(self.script.jobs), list(self.script.faults)
        while jobs or faults or not all(job.ended for job in self.running):
            passed = time.monotonic() - began
            assert passed < END_S, f"not every job has ended: {self._states()}"
            self.home.tend()
            if faults and passed >= faults[0].at_s:
                inflict(self.home, faults.pop(0))
            if jobs and passed >= jobs[0].at_s:
                self._submit(jobs)
            for job in self.running:
                self._move(job, passed)
                self.home.tend()  # each question may wait for a store that is asleep
            time.sleep(0.05)
        self._calm_down()
        self._check()

    def _submit(self, jobs: list[Part]) -> None:
        # Asked once a turn, so that faults go on happening while the API is away.
        key = f"{self.script.seed}-{jobs[0].recipe.name}"
        answer = self.client.try_once(
            "POST", "/v1/jobs", json=dict(jobs[0].recipe.body), headers={"Idempotency-Key": key}
        )
        if answer is not None:
            assert answer.status_code in (200, 202), answer.text
            job_id = answer.json()["id"]
            follower = Follower(self.home.url, job_id)
            self.running.append(Running(jobs.pop(0), job_id, follower))

    def _move(self, job: Running, passed: float) -> None:
        """Cancel or resume the job when its moment has come; notice its end."""
        part, path = job.part, f"/v1/jobs/{job.job_id}"
        if part.cancel_s is not None and not job.cancelled and passed >= part.cancel_s:
            answer = self.client.try_once("POST", f"{path}/cancel", json={"discard": part.discard})
            if answer is not None:
                assert answer.status_code in (202, 409), answer.text
                job.cancelled = True
        answer = self.client.try_once("GET", path)
        if answer is None:
            return
        assert answer.status_code == 200, answer.text
        status = answer.json()["status"]
        if status == "cancelled" and part.resume and job.cancelled and not job.resumed:
            answer = self.client.try_once("POST", f"{path}/resume")
            job.resumed = answer is not None and answer.status_code in (202, 409)
            return
        waiting = part.cancel_s is not None and not job.cancelled and status not in FINAL
        job.ended = status in FINAL and not waiting

    def _states(self) -> list[dict[str, Any]]:
        return [self.client.job(job.job_id) for job in self.running]

    def _calm_down(self) -> None:
        """Wake what sleeps, end what is too many, and wait until every process is there again."""
        for pid in self.home.asleep:
            self.home.asleep[pid] = 0.0
        self.home.tend()
        for extra in self.home.workers[2:]:
            extra.stop()
            self.home.workers.remove(extra)
        self.home.wait_until_ready()

    def _check(self) -> None:
        for job in self.running:
            self._check_end(job)
            self._check_events(job)
        self._check_list()
        home, recipes = self.home, [job.recipe for job in self.running]
        self._wait_for_nothing(home.orphans, "orphans")
        self._wait_for_nothing(lambda: self.traces.of_work(home, recipes), "left of work")
        for job in self.running:
            assert self.client.ask("DELETE", f"/v1/jobs/{job.job_id}").status_code == 204
            clear(home, job.recipe)
        self._wait_for_nothing(lambda: self.traces.of_anything(home), "left of deleted jobs")

    def _wait_for_nothing(self, look: Callable[[], Sequence[str]], what: str) -> None:
        deadline = time.monotonic() + SETTLE_S
        while found := look():
            assert time.monotonic() < deadline, f"{what}: {found}"
            time.sleep(0.1)

    def _check_end(self, job: Running) -> None:
        answer, recipe = self.client.job(job.job_id), job.recipe
        allowed = {recipe.status}
        if job.cancelled and not job.resumed:
            allowed.add("cancelled")
        assert answer["status"] in allowed, answer
        found = outcome_of(self.home, self.client, recipe, job.job_id)
        succeeded = answer["status"] == "succeeded"
        assert found == (self.undisturbed[recipe.name] if succeeded else Outcome()), recipe.name
        if answer["status"] == "failed":
            assert answer["error"]["code"] == recipe.code, answer["error"]

    def _check_events(self, job: Running) -> None:
        """Every event reached the follower once, in order; every matrix was told of once."""
        events = self.client.events(job.job_id)
        ids = [event["id"] for event in events]
        wait_for(lambda: job.follower.caught_up(ids[-1]), f"the last event of {job.job_id}", 60)
        job.follower.end()
        assert job.follower.seen == ids
        assert len(set(ids)) == len(ids)
        types = [event["type"] for event in events]
        assert sum(types.count(kind) for kind in FINAL) == 1 + job.resumed, types
        assert types.count("queued") == 1
        replanned = types.count("planned") + types.count("resumed")
        if replanned == 1 and types[-1] == "succeeded":
            told = [e["data"]["module"] for e in events if e["type"] == "matrix_done"]
            assert len(set(told)) == len(told)
            shards = [e["data"]["shard"] for e in events if e["type"] == "shard_done"]
            assert len(set(shards)) == len(shards) == max(1, len(shards))

    def _check_list(self) -> None:
        """Every job is there once: none was accepted twice, none was lost."""
        listed = self.client.ask("GET", "/v1/jobs", params={"limit": 200}).json()["jobs"]
        assert sorted(job["id"] for job in listed) == sorted(job.job_id for job in self.running)
