"""Faults with an end of their own: a full disk, no memory, a long silence, the whole house gone."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from cages import fill, limit_memory, memory_cage, small_disk
from client import Client
from household import Household, free_port, household, make_household
from recipes import EXACT
from worker_tools import checksums, kill_tree, leftovers, wait_for, write_llama

pytestmark = pytest.mark.chaos

OUTPUT = "./place/out"
BODY = {"model": "./m", "output": OUTPUT, "pissa": EXACT}
INITIAL = "./pair/pissa_init"
BODIES: Mapping[str, dict[str, Any]] = {
    "base-to-pissa": BODY,
    "pissa-to-lora": {
        "kind": "pissa-to-lora", "trained": INITIAL, "initial": INITIAL, "output": OUTPUT,
    },
    "pissa-to-base": {
        "kind": "pissa-to-base", "residual": "./pair", "adapter": INITIAL, "output": OUTPUT,
    },
}  # fmt: skip
"""A job of each kind that writes; the ways back begin with a pair made from the same model."""
HIDDEN = 4096  # of a matrix of 64 MiB, which needs several times that in flight


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Household]:
    """A service of one worker, as patient with losses as by default."""
    write_llama(tmp_path / "models" / "m", layers=3, hidden=256, shards=3)
    with household(tmp_path, workers=1, max_losses=3) as running:
        yield running


@pytest.fixture
def client(home: Household) -> Iterator[Client]:
    opened = Client(home.url)
    yield opened
    opened.close()


def end_of(home: Household, client: Client, job_id: str) -> dict[str, Any]:
    def ended() -> dict[str, Any] | None:
        home.tend()
        answer = client.try_once("GET", f"/v1/jobs/{job_id}")
        return answer.json() if answer is not None and answer.json()["finished_at"] else None

    return wait_for(ended, f"the end of {job_id}", 240)


def wait_for_event(home: Household, client: Client, job_id: str, kind: str) -> None:
    def told() -> bool:
        home.tend()
        return any(event["type"] == kind for event in client.events(job_id))

    wait_for(told, f"{kind} of {job_id}", 120)


def undisturbed(home: Household, client: Client, body: Mapping[str, Any] = BODY) -> dict[str, str]:
    job = end_of(home, client, client.submit(dict(body), "undisturbed"))
    assert job["status"] == "succeeded", job
    output = home.folder / "models" / "place" / "out"
    found = checksums(output)
    shutil.rmtree(output)
    return found


@pytest.mark.parametrize("kind", BODIES)
def test_a_disk_that_fills_up_is_told_of_and_a_resume_goes_on(
    home: Household, client: Client, kind: str
) -> None:
    pair = end_of(home, client, client.submit({**BODY, "output": "./pair"}, "pair"))
    assert pair["status"] == "succeeded", pair
    with small_disk(home.folder / "models" / "place", 40 << 20) as place:
        expected = undisturbed(home, client, BODIES[kind])
        node = compute_node(home)
        # What is quick would be done before the disk is full.
        kill_tree(node.pid, signal.SIGSTOP)
        job_id = client.submit(BODIES[kind], "full")
        wait_for_event(home, client, job_id, "planned")
        ballast = fill(place)
        kill_tree(node.pid, signal.SIGCONT)
        job = end_of(home, client, job_id)
        assert job["error"]["code"] == "disk_full", job
        assert not (place / "out").exists()
        ballast.unlink()
        assert client.ask("POST", f"/v1/jobs/{job_id}/resume").status_code == 202
        assert end_of(home, client, job_id)["status"] == "succeeded"
        assert checksums(place / "out") == expected
        assert leftovers(place) == []


def test_a_store_whose_disk_fills_up_loses_nothing(tmp_path: Path) -> None:
    write_llama(tmp_path / "models" / "m", layers=3, hidden=256, shards=3)
    with small_disk(tmp_path / "valkey", 8 << 20) as disk, household(tmp_path) as home:
        client = Client(home.url)
        expected = undisturbed(home, client)
        job_id = client.submit(BODY, "full")
        wait_for_event(home, client, job_id, "started")
        ballast = fill(disk)
        wait_for(lambda: not home.valkey.alive, "the end of the store", 60)
        assert client.try_once("GET", "/v1/jobs") is None
        ballast.unlink()
        assert end_of(home, client, job_id)["status"] == "succeeded"
        assert checksums(tmp_path / "models" / "place" / "out") == expected
        client.close()


def test_a_store_that_is_away_for_a_minute_is_waited_for(home: Household, client: Client) -> None:
    expected = undisturbed(home, client)
    job_id = client.submit(BODY, "away")
    wait_for_event(home, client, job_id, "started")
    home.valkey.kill()
    home.valkey.due = time.monotonic() + 60
    job = end_of(home, client, job_id)
    assert job["status"] == "succeeded", job
    assert checksums(home.folder / "models" / "place" / "out") == expected


def compute_node(home: Household) -> psutil.Process:
    """Return the node that computes, once its child waits for work."""
    log = home.workers[0].log
    wait_for(lambda: log.read_text().count("ready.") == 2, "both nodes", 60)
    nodes = psutil.Process(home.workers[0].pid).children()
    [node] = [node for node in nodes if node.environ()["PISSA_NODE_ROLE"] == "compute"]
    return node


def big_job(home: Household, client: Client) -> str:
    write_llama(home.folder / "models" / "big", layers=1, hidden=HIDDEN, shards=1)
    pissa = {"rank": 4, "target_modules": ["down_proj"]}
    return client.submit({"model": "./big", "output": "./place/big", "pissa": pissa}, "big")


def test_a_kill_for_want_of_memory_is_named_and_does_not_loop(
    home: Household, client: Client
) -> None:
    with memory_cage() as cage:
        node = compute_node(home)
        limit_memory(cage, [node.pid, *(child.pid for child in node.children())], 150 << 20)
        job_id = big_job(home, client)
        job = end_of(home, client, job_id)
        assert job["error"]["code"] == "out_of_memory", job
        waits = [e["data"]["code"] for e in client.events(job_id) if e["type"] == "waiting"]
        assert waits == ["out_of_memory"] * 2
        # The node itself lives on, and with room takes the next job.
        assert node.is_running()
        limit_memory(cage, [], 8 << 30)
        assert client.ask("POST", f"/v1/jobs/{job_id}/resume").status_code == 202
        assert end_of(home, client, job_id)["status"] == "succeeded"
        home.workers[0].stop()


def test_memory_that_is_refused_ends_the_job_at_once(home: Household, client: Client) -> None:
    for child in compute_node(home).children():
        limit = child.memory_info().vms + (200 << 20)
        child.rlimit(resource.RLIMIT_AS, (limit, limit))
    job_id = big_job(home, client)
    job = end_of(home, client, job_id)
    assert job["error"]["code"] == "out_of_memory", job
    assert "waiting" not in [event["type"] for event in client.events(job_id)]


def test_the_whole_house_dies_and_rises_again(tmp_path: Path) -> None:
    """`pissa serve` killed thrice: its workers and its store go with it, and its jobs go on."""
    laid_out = make_household(tmp_path)
    for part in laid_out.parts:
        part.wanted = False
    write_llama(tmp_path / "models" / "m", layers=3, hidden=256, shards=3)
    environment = {k: v for k, v in laid_out.environment.items() if k != "PISSA_REDIS_URL"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # two workers, however many GPUs
    port = free_port()
    command = [sys.executable, "-m", "app.cli", "serve", "--port", str(port), "--workers", "2"]
    client = Client(f"http://127.0.0.1:{port}")
    job_ids = []
    with (tmp_path / "serve.log").open("wb") as log:
        for wait_until in ("started", "planned", "shard_done", "succeeded"):
            with subprocess.Popen(command, env=environment, stdout=log, stderr=log) as serve:
                try:
                    output = f"./place/out-{wait_until}"
                    job_ids.append(client.submit({**BODY, "output": output}, wait_until))
                    wait_for_event(laid_out, client, job_ids[-1], wait_until)
                    if wait_until == "succeeded":
                        for job_id in job_ids:
                            assert end_of(laid_out, client, job_id)["status"] == "succeeded"
                finally:
                    serve.kill()
            wait_for(lambda: not laid_out.members(), "the end of all that serve started", 30)
    client.close()
    place = tmp_path / "models" / "place"
    first, *others = [checksums(folder) for folder in sorted(place.iterdir())]
    assert len(others) == 3
    assert all(other == first for other in others)
    assert leftovers(place) == []
