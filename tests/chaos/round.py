"""Plays one round: jobs come, faults happen, everything ends, and nothing may be amiss."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import hubrepo
from client import FINAL, Client, Follower
from faults import inflict
from household import Household, store_of
from recipes import Recipe
from script import Part, Script
from worker_tools import checksums, leftovers, wait_for

END_S = 240.0
SETTLE_S = 60.0
Sums = Mapping[str, Mapping[str, str]]


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
    undisturbed: Sums
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
        wait_for(lambda: not self.home.orphans(), f"no orphans: {self.home.orphans()}", SETTLE_S)
        self._wait_for_nothing(lambda: traces(self.home), "a trace in the store")
        self._wait_for_nothing(lambda: scratch(self.home), "scratch left behind")
        recipes = [job.recipe for job in self.running]
        self._wait_for_nothing(lambda: staged(self.home, recipes), "staging branches left behind")
        for job in self.running:
            assert self.client.ask("DELETE", f"/v1/jobs/{job.job_id}").status_code == 204
            clear(self.home, job.recipe)
        self._wait_for_nothing(lambda: records(self.home), "records of deleted jobs")
        self._wait_for_nothing(lambda: kept(self.home), "files of deleted jobs")

    def _wait_for_nothing(self, look: Any, what: str) -> None:
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
        found = result_of(self.home, recipe, job.job_id)
        expected = self.undisturbed[recipe.name] if answer["status"] == "succeeded" else {}
        assert found == expected, recipe.name
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


def traces(home: Household) -> list[str]:
    """Return what of unfinished work the store still holds."""
    client, found = store_of(home), []
    for pattern in ("pissa:leases", "pissa:delayed", "pissa:sent:*", "pissa:turn:*",
                    "pissa:staging:*", "pissa:job:*:tasks", "pissa:job:*:held",
                    "pissa:celery:plan*", "pissa:celery:work*"):  # fmt: skip
        found += [str(key) for key in client.scan_iter(pattern)]
    client.close()
    return found


def scratch(home: Household) -> list[str]:
    """Return what lies about on the disk beside results."""
    folders = [home.settings.files_dir, home.folder / "models" / "out"]
    found = [name for folder in folders if folder.is_dir() for name in leftovers(folder)]
    # Empty folders that a killed process leaves in TMPDIR are the system's to sweep.
    temporary = (home.folder / "tmp").rglob("*")
    found += [str(path) for path in temporary if path.is_file()]
    work = home.settings.data_dir / "scratch"
    return found + ([path.name for path in work.iterdir()] if work.is_dir() else [])


def staged(home: Household, recipes: Sequence[Recipe]) -> list[str]:
    """Return the staging branches that are left on the Hub."""
    repos = [recipe.repo for recipe in recipes if recipe.repo]
    return [name for repo in repos for name in hubrepo.branches_of(home.hub_url, repo)]


def result_of(home: Household, recipe: Recipe, job_id: str) -> dict[str, str]:
    """Return the checksum of every file that a job has made visible."""
    if recipe.repo:
        return hubrepo.files_of(home.hub_url, recipe.repo)
    output = recipe.output or home.settings.files_dir / job_id
    return checksums(output) if output.exists() else {}


def clear(home: Household, recipe: Recipe) -> None:
    """Remove a result, so that the recipe can be followed again."""
    if recipe.repo:
        hubrepo.delete(home.hub_url, recipe.repo)
    if recipe.output:
        shutil.rmtree(recipe.output, ignore_errors=True)


def records(home: Household) -> list[str]:
    client = store_of(home)
    found = [str(key) for key in client.scan_iter("pissa:job:*")]
    client.close()
    return found


def kept(home: Household) -> list[str]:
    folder = home.settings.files_dir
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []
