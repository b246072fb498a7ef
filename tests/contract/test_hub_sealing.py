"""Seals in batches: few commits for many shards, whoever is killed, stopped or called off."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

import pytest
from hub.faults import Fault
from hub.state import Hub
from hub_tools import IN, OUT
from machines import Machine, wait_until
from places import named_seal_in

from pissa_core import leaving
from pissa_core.adapters.hub import Pause
from pissa_core.adapters.hub.pending import Pending, Ready
from pissa_core.adapters.hub.sweeping import PREFIX
from pissa_core.errors import HubUnavailable

T = TypeVar("T")
STAGING = f"/commit/{PREFIX}d1$"


def hold_first_commit(machine: Machine, until: int) -> threading.Event:
    """Have the first commit of a seal, once it comes, wait until so many seals wait."""
    come = threading.Event()

    def hold(token: str) -> None:
        come.set()
        wait_until(lambda: machine.waiting() >= until)

    machine.hub.faults.add(Fault(STAGING, "POST", run=hold))
    return come


def one_then_the_others(
    come: threading.Event, seal: Callable[[str], T], shards: list[str]
) -> list[T]:
    """Seal shards in threads, the others once the commit of the first has come."""
    with ThreadPoolExecutor(len(shards)) as pool:
        first = pool.submit(seal, shards[0])
        assert come.wait(60)
        rest = list(pool.map(seal, shards[1:]))
        return [first.result(), *rest]


def test_seals_that_are_ready_while_one_is_committed_share_the_next_commit(machine):
    shards = [f"{n}.safetensors" for n in range(3)]
    come = hold_first_commit(machine, until=3)
    first = machine.begin(shards[0])
    assert come.wait(60)
    for token in [first, *(machine.begin(shard) for shard in shards[1:])]:
        machine.ends(token)
    assert machine.sealed(shards) == set(shards)
    assert machine.titles() == [f"Seal {shards[0]}", "Seal 2 shards"]
    assert set(machine.hub.uploads.finished.values()) == {1}
    assert not list(machine.scratch.iterdir())


def test_threads_of_one_process_share_commits_too(hub, open_hub_sink, machine):
    sink = open_hub_sink(OUT, hub.create_token("somebody"))
    shards = [f"{n}.safetensors" for n in range(4)]
    come = hold_first_commit(machine, until=4)
    one_then_the_others(come, lambda shard: named_seal_in(sink, shard), shards)
    assert machine.sealed(shards) == set(shards)
    assert machine.titles() == [f"Seal {shards[0]}", "Seal 3 shards"]


def test_a_quiet_job_commits_each_shard_at_once(hub, open_hub_sink, machine):
    told: list[Pause | None] = []
    sink = open_hub_sink(OUT, hub.create_token("somebody"), on_wait=told.append)
    for shard in ("a", "b", "c"):
        named_seal_in(sink, shard)
    assert machine.titles() == ["Seal a", "Seal b", "Seal c"]
    assert told == []


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 504, "served": True},
        {"drop": True, "served": True},
        {"status": 503},
        {"status": 429, "headers": {"Retry-After": "1"}},
    ],
    ids=["504-served", "cut-served", "503", "429"],
)
def test_a_common_commit_whose_answer_is_lost_is_not_made_twice(hub, open_hub_sink, machine, fault):
    sink = open_hub_sink(OUT, hub.create_token("somebody"))
    shards = [f"{n}.safetensors" for n in range(3)]
    come = hold_first_commit(machine, until=3)
    lost = hub.faults.add(Fault(STAGING, "POST", **fault))
    one_then_the_others(come, lambda shard: named_seal_in(sink, shard), shards)
    assert lost.times == 0
    assert machine.sealed(shards) == set(shards)
    assert machine.titles() == [f"Seal {shards[0]}", "Seal 2 shards"]


@pytest.mark.slow
@pytest.mark.parametrize("served", [False, True])
def test_one_that_is_killed_amid_a_common_commit_leaves_it_to_the_others(machine, served):
    hub, shards = machine.hub, ["a", "b", "c"]
    killed: list[str] = []

    def kill(token: str) -> None:
        machine.children[token].send_signal(signal.SIGKILL)
        machine.children[token].wait()
        killed.append(token)

    come = hold_first_commit(machine, until=3)
    hub.faults.add(Fault(STAGING, "POST", run=kill, drop=True, served=served))
    begun = {machine.begin("a"): "a"}
    assert come.wait(60)
    begun |= {machine.begin(shard): shard for shard in ("b", "c")}
    wait_until(lambda: killed)
    for token in begun.keys() - killed:
        machine.ends(token)
    left = set(shards) - machine.sealed(shards)
    assert left <= {begun[token] for token in killed}
    for shard in sorted(left):
        machine.ends(machine.begin(shard))
    assert machine.sealed(shards) == set(shards)
    assert set(hub.uploads.finished.values()) == {1}
    assert not list(machine.scratch.glob("d1/.sealing/*"))


@pytest.mark.slow
def test_a_killed_one_that_waited_is_not_sealed_by_the_others(machine):
    """Its shard may be another's by now; what it sent is not sent again."""
    tokens: dict[str, str] = {}

    def kill(token: str) -> None:
        wait_until(lambda: machine.waiting() == 3)
        machine.children[tokens["b"]].kill()
        machine.children[tokens["b"]].wait()

    machine.hub.faults.add(Fault(STAGING, "POST", run=kill))
    for shard in ("a", "b", "c"):
        tokens[shard] = machine.begin(shard)
        wait_until(lambda: machine.waiting() == len(tokens))
    machine.ends(tokens["a"])
    machine.ends(tokens["c"])
    assert machine.sealed(["a", "b", "c"]) == {"a", "c"}
    machine.ends(machine.begin("b"))
    assert machine.sealed(["b"]) == {"b"}
    assert set(machine.hub.uploads.finished.values()) == {1}


def test_a_stopped_one_is_passed_over_and_holds_up_nobody(machine, open_hub_sink):
    """Stopped while it waits it is not sealed, and stopped while it commits not waited for."""
    stalled = threading.Event()
    machine.hub.faults.add(Fault(STAGING, "POST", run=lambda _: stalled.wait(60), drop=True))
    leader = machine.begin("a")
    wait_until(lambda: machine.waiting() == 1)
    follower = machine.begin("b")
    wait_until(lambda: machine.waiting() == 2)
    for token in (follower, leader):
        machine.stop(token)
    for path in machine.scratch.glob("d1/.sealing/*"):
        os.utime(path, (0, 0))
    named_seal_in(open_hub_sink(OUT, machine.hub.create_token("somebody")), "c")
    assert machine.sealed(["a", "b", "c"]) == {"c"}
    stalled.set()
    for token in (leader, follower):
        machine.children[token].send_signal(signal.SIGCONT)
        machine.ends(token)
    assert machine.sealed(["a", "b", "c"]) == {"a", "b", "c"}
    assert set(machine.hub.uploads.finished.values()) == {1}


def test_one_that_is_called_off_while_it_waits_takes_its_seal_back(hub, open_hub_sink, machine):
    sink, stop = open_hub_sink(OUT, hub.create_token("somebody")), threading.Event()

    def called_off() -> None:
        with leaving.leaving_on(stop), pytest.raises(leaving.CalledOff):
            named_seal_in(sink, "b")

    with ThreadPoolExecutor(2) as pool, ExitStack() as others:
        another = Pending(machine.scratch / "d1" / ".sealing")
        record = others.enter_context(another.joined(Ready("x", (), {})))
        others.enter_context(another.turn(record))
        waits = pool.submit(called_off)
        wait_until(lambda: machine.waiting() == 2)
        stop.set()
        waits.result()
        assert machine.waiting() == 1
    assert machine.sealed(["b"]) == set()


def test_two_machines_race_and_every_shard_is_sealed_once(hub, open_hub_sink, machine):
    sinks = [open_hub_sink(OUT, hub.create_token("somebody"), machine=m) for m in ("here", "there")]
    shards = [f"{n}.safetensors" for n in range(6)]
    with ThreadPoolExecutor(12) as pool:
        work = [pool.submit(named_seal_in, sink, shard) for sink in sinks for shard in shards]
        for each in work:
            each.result()
    assert machine.sealed(shards) == set(shards)
    sealed = [
        path
        for commit in hub.repos[OUT].history(f"{PREFIX}d1")
        for path in commit.files
        if path.endswith("seal.json") and path not in _parent_files(hub, commit)
    ]
    assert len(sealed) == len(set(sealed)) == len(shards)


def _parent_files(hub: Hub, commit):
    return hub.repos[OUT].commits[commit.parent].files if commit.parent else {}


def test_what_the_hub_refuses_of_one_does_not_fail_the_others(hub, open_hub_sink, machine):
    """A large file that was sent too long ago is gone by the time of the commit."""
    sink = open_hub_sink(OUT, hub.create_token("somebody"))
    wanted = hashlib.sha256(b"c" * 100).hexdigest()

    def lose(token: str) -> None:
        wait_until(lambda: machine.waiting() == 3)
        del hub.repos[OUT].objects[wanted]

    hub.faults.add(Fault(STAGING, "POST", run=lose))

    def seal(shard: str) -> str:
        try:
            named_seal_in(sink, shard)
        except HubUnavailable:
            return "refused"
        return "sealed"

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(seal, "a")
        wait_until(lambda: machine.waiting() == 1)
        rest = {shard: pool.submit(seal, shard) for shard in ("b", "c")}
        assert first.result() == rest["b"].result() == "sealed"
        assert rest["c"].result() == "refused"
    named_seal_in(sink, "c")
    assert machine.sealed(["a", "b", "c"]) == {"a", "b", "c"}


def test_shards_copied_on_the_hub_share_commits(hub, open_hub, open_hub_sink, machine):
    hub.cross_repo = True
    files = {f"{n}.safetensors": random.Random(n).randbytes(1000) for n in range(4)}
    hub.create_repo(IN, files=files)
    token = hub.create_token("somebody")
    source, sink = open_hub(IN, token), open_hub_sink(OUT, token)
    come = hold_first_commit(machine, until=4)
    assert all(one_then_the_others(come, lambda path: sink.adopt(path, source, path), list(files)))
    assert machine.sealed(list(files)) == set(files)
    assert machine.titles() == ["Seal 0.safetensors", "Seal 3 shards"]
    assert not hub.uploads.finished
