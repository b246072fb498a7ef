"""Leases, retries and the reaper: what was accepted is worked on, whoever dies."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import pytest
from store_tools import DIGEST, REQUEST, do_all, do_prepare, do_shard, make_plan, row, take
from worker_tools import wait_for

from pissa_core.errors import Cancelled, HubUnavailable, PissaError, SourceChanged
from pissa_core.plan import Plan
from worker.connect import open_store
from worker.contract import JobWait
from worker.errors import StoreUnavailable
from worker.processes import holder_id, is_dead
from worker.settings import Settings
from worker.store import JobStore, LeaseLost, Reaper, Stop, TaskStore
from worker.store.connection import Connection
from worker.terms import Phase, Status, Task


class Pigeonhole:
    """A sender that keeps what it is given; while it is shut it fails, as a broker may."""

    prefix = "nowhere:"

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []
        self.shut = False

    def enqueue(self, task: Task, *args: str | int, queue: str, task_id: str) -> None:
        if self.shut:
            raise ConnectionError("the broker is away")
        self.sent.append((task_id, queue))

    def tasks(self) -> list[str]:
        return [task_id.partition("|")[2] for task_id, _ in self.sent]


@pytest.fixture
def pigeonhole(store: JobStore) -> Pigeonhole:
    hole = Pigeonhole()
    store.connection.sender = hole
    return hole


@pytest.fixture
def reaper(store: JobStore, settings: Settings) -> Reaper:
    return Reaper(store.connection, settings)


def submit(store: JobStore) -> str:
    return store.submit(REQUEST, owner="me")[0].id


def settled(settings: Settings, **changes: float) -> Settings:
    return settings.model_copy(update=changes)


def rounds(reaper: Reaper, store: JobStore, look: object, what: str) -> None:
    """Go round until something is so."""

    def once() -> bool:
        reaper.round()
        return bool(look())  # type: ignore[operator]

    wait_for(once, what, 20)


def state(store: JobStore, job_id: str, task: str) -> str | None:
    text = store.connection.client.hget(f"pissa:job:{job_id}:tasks", task)
    return None if text is None else json.loads(str(text))["state"]


def test_a_task_that_was_never_sent_is_sent_later(
    store: JobStore, reaper: Reaper, pigeonhole: Pigeonhole
) -> None:
    pigeonhole.shut = True
    job_id = submit(store)
    pigeonhole.shut = False
    rounds(reaper, store, lambda: pigeonhole.sent, "the message")
    assert pigeonhole.sent[0] == (f"{job_id}|prepare", "plan")


def test_a_message_that_waits_in_its_queue_is_not_sent_twice(
    store: JobStore, settings: Settings
) -> None:
    job_id = submit(store)
    key = f"{store.connection.sender.prefix}plan"
    reaper = Reaper(store.connection, settled(settings, reap_s=0.02))
    for _ in range(10):
        wait_for(reaper.round, "a round", 5)
    assert store.connection.client.llen(key) == 1
    assert store.connection.client.delete(key) == 1
    rounds(reaper, store, lambda: store.connection.client.llen(key), "the message, sent again")
    [message] = store.connection.client.lrange(key, 0, -1)
    assert f'"{job_id}|prepare"' in message


def test_a_lease_that_runs_out_is_given_to_another(
    store: JobStore, tasks: TaskStore, reaper: Reaper, settings: Settings, pigeonhole: Pigeonhole
) -> None:
    job_id = submit(store)
    short = TaskStore(store.connection, settled(settings, lease_s=0.2), worker="slow@here")
    do_prepare(short, job_id)
    stale = take(short, job_id, "shard:0")
    rounds(reaper, store, lambda: state(store, job_id, "shard:0") != "leased", "the lease's end")
    fresh = take(tasks, job_id, "shard:0")
    assert fresh.attempts == 2
    with pytest.raises(LeaseLost):
        short.matrix_done(stale, row("s0", 0), nbytes=1, seconds=1, resumed=False)
    with pytest.raises(LeaseLost):
        short.shard_done(stale, "s0", nbytes=1, matrices=2, resumed=False, peak=None)
    assert store.get(job_id).progress.matrices.done == 0
    tasks.matrix_done(fresh, row("s0", 0), nbytes=1, seconds=1, resumed=False)
    assert store.get(job_id).attempts == 2


def test_a_lease_that_is_renewed_stays(
    store: JobStore, tasks: TaskStore, reaper: Reaper, settings: Settings
) -> None:
    job_id = submit(store)
    short = TaskStore(store.connection, settled(settings, lease_s=0.2), worker="slow@here")
    claim = take(short, job_id, "prepare")
    tasks.renew(claim)
    wait_for(lambda: not reaper.round(), "a second round refused while the first is fresh", 5)
    assert short.look(claim) is None


def test_a_job_whose_workers_keep_dying_fails(
    store: JobStore, tasks: TaskStore, settings: Settings
) -> None:
    job_id = submit(store)
    reaper = Reaper(store.connection, settled(settings, reap_s=0.05))
    for _ in range(settings.max_losses):
        dead = subprocess.Popen([sys.executable, "-c", _SAY_HOLDER], stdout=subprocess.PIPE)
        assert dead.stdout is not None
        holder = dead.stdout.readline().decode().strip()
        dead.kill()
        dead.communicate()
        assert is_dead(holder)
        assert tasks.claim(job_id, "prepare", holder=holder) is not None
        rounds(reaper, store, lambda: state(store, job_id, "prepare") != "leased", "the loss")
    job = store.get(job_id)
    assert job.status is Status.FAILED
    assert job.error is not None
    assert job.error.code == "attempts_exhausted"
    assert "hand@here died while it was at prepare: the last of 3 workers" in job.error.message
    assert job.attempts == settings.max_losses
    waits = [event.data for event in store.events(job_id)[0] if event.type.value == "waiting"]
    assert [wait["code"] for wait in waits] == ["worker_lost"] * (settings.max_losses - 1)


_SAY_HOLDER = (
    "import sys, time; from worker.processes import holder_id; "
    "print(holder_id(), flush=True); time.sleep(60)"
)


def test_how_the_worker_died_is_said_by_who_knows(store: JobStore, tasks: TaskStore) -> None:
    job_id = submit(store)
    one_life = settled_store(store, max_losses=1)
    boot, _, _ = holder_id().rpartition("/")
    assert tasks.claim(job_id, "prepare", holder=f"{boot}/0") is not None
    one_life.take_back_from_dead(out_of_memory=True)
    error = store.get(job_id).error
    assert error is not None
    assert error.code == "out_of_memory"


def test_a_known_cause_outlives_losses_without_one(store: JobStore, tasks: TaskStore) -> None:
    job_id = submit(store)
    boot, _, _ = holder_id().rpartition("/")
    reaper = settled_store(store, max_losses=2)
    for out_of_memory in (True, False):
        assert tasks.claim(job_id, "prepare", holder=f"{boot}/0") is not None
        reaper.take_back_from_dead(out_of_memory=out_of_memory)
    error = store.get(job_id).error
    assert error is not None
    assert error.code == "out_of_memory"


def settled_store(store: JobStore, **changes: float) -> Reaper:
    return Reaper(store.connection, settled(store._settings, **changes))


def test_this_process_and_a_stranger_are_not_dead() -> None:
    assert not is_dead(holder_id())
    assert not is_dead("another-boot:pid/1/1")
    assert not is_dead("")


def test_a_retryable_error_waits_and_tries_again(
    store: JobStore, tasks: TaskStore, reaper: Reaper
) -> None:
    job_id = submit(store)
    do_prepare(tasks, job_id)
    tasks.retry(take(tasks, job_id, "shard:0"), HubUnavailable("503"), restart=False)
    waiting = store.get(job_id)
    assert (waiting.status, waiting.phase) == (Status.RUNNING, Phase.WAITING)
    assert waiting.waiting == JobWait(code="hub_unavailable", message="503", delay_s=0.2)
    [event] = [e for e in store.events(job_id)[0] if e.type.value == "waiting"]
    assert event.data == {
        "task": "shard:0", "code": "hub_unavailable", "message": "503", "delay_s": 0.2,
    }  # fmt: skip
    assert tasks.claim(job_id, "shard:0", holder="") is None
    rounds(reaper, store, lambda: state(store, job_id, "shard:0") != "delayed", "the retry")
    do_shard(tasks, job_id, 0)
    over = store.get(job_id)
    assert (over.phase, over.waiting) == (Phase.SHARDS, None)


def test_a_retry_that_never_helps_ends_with_the_errors_own_code(
    store: JobStore, tasks: TaskStore, settings: Settings, reaper: Reaper
) -> None:
    job_id = submit(store)
    few = TaskStore(store.connection, settled(settings, max_retries=2, retry_s=0.01), worker="w")
    for _ in range(3):
        rounds(reaper, store, lambda: state(store, job_id, "prepare") != "delayed", "the retry")
        few.retry(take(few, job_id, "prepare"), HubUnavailable("503"), restart=False)
    error = store.get(job_id).error
    assert error is not None
    assert (error.code, error.message) == ("hub_unavailable", "503")


@pytest.mark.parametrize("error", [SourceChanged("other bytes"), Cancelled("discarded")])
def test_a_job_whose_ground_moved_is_planned_anew(
    store: JobStore, tasks: TaskStore, reaper: Reaper, error: PissaError
) -> None:
    job_id = submit(store)
    do_prepare(tasks, job_id)
    do_shard(tasks, job_id, 0)
    other = take(tasks, job_id, "shard:1")
    assert tasks.plan_text(job_id)
    tasks.retry(other, error, restart=True)
    with pytest.raises(LeaseLost):
        tasks.plan_text(job_id)
    again = store.get(job_id)
    assert (again.progress.shards.done, again.progress.matrices.done) == (0, 0)
    rounds(reaper, store, lambda: state(store, job_id, "prepare") != "delayed", "the new plan")
    do_all(tasks, job_id)
    assert store.get(job_id).status is Status.SUCCEEDED


def test_a_job_that_is_discarded_under_its_hands_again_and_again_says_so(
    store: JobStore, settings: Settings, reaper: Reaper
) -> None:
    job_id = submit(store)
    few = TaskStore(store.connection, settled(settings, max_retries=1, retry_s=0.01), worker="w")
    for _ in range(2):
        rounds(reaper, store, lambda: state(store, job_id, "prepare") != "delayed", "the restart")
        few.retry(take(few, job_id, "prepare"), Cancelled("discarded"), restart=True)
    error = store.get(job_id).error
    assert error is not None
    assert error.code == "attempts_exhausted"
    assert "discarded under it" in error.message


def test_a_worker_that_stops_hands_its_task_back_unharmed(
    store: JobStore, tasks: TaskStore, settings: Settings
) -> None:
    job_id = submit(store)
    do_prepare(tasks, job_id)
    claim = take(tasks, job_id, "shard:0")
    store.connection.call("drain", name="hand@here")
    assert tasks.look(claim) is Stop.DRAIN
    assert tasks.claim(job_id, "shard:1", holder="") is None
    Reaper(store.connection, settings).hand_back("hand@here")
    another = TaskStore(store.connection, settings, worker="other@here")
    assert [take(another, job_id, f"shard:{index}").attempts for index in (0, 1)] == [1, 1]


def test_a_killed_sweep_of_a_published_job_is_finished_by_another(
    store: JobStore, tasks: TaskStore
) -> None:
    job_id = submit(store)
    do_prepare(tasks, job_id, shards=1)
    do_shard(tasks, job_id, 0)
    boot, _, _ = holder_id().rpartition("/")
    claim = tasks.claim(job_id, "publish", holder=f"{boot}/0")
    assert claim is not None
    tasks.published(claim, result={"matrices": 2}, manifest={"schema": 1}, peak=1)
    assert store.get(job_id).status is Status.RUNNING
    settled_store(store, max_losses=1).take_back_from_dead(out_of_memory=False)
    assert store.get(job_id).status is Status.SUCCEEDED


def test_small_jobs_are_not_starved_by_a_big_one(
    store: JobStore, tasks: TaskStore, pigeonhole: Pigeonhole
) -> None:
    big = submit(store)
    do_prepare(tasks, big, shards=20)
    small = submit(store)
    do_prepare(tasks, small, shards=2)
    order = []
    for _ in range(8):
        task_id, _ = next(entry for entry in pigeonhole.sent if "shard" in entry[0])
        pigeonhole.sent.remove((task_id, "work"))
        job_id, _, task = task_id.partition("|")
        order.append(job_id)
        do_shard(tasks, job_id, int(task.partition(":")[2]))
    # The window of two was full of the big job when the small one came; then they take turns.
    assert order[:6] == [big, big, big, small, big, small]


def test_a_queue_holds_few_messages_however_many_shards_wait(
    store: JobStore, tasks: TaskStore, reaper: Reaper
) -> None:
    do_prepare(tasks, submit(store), shards=50)
    client = store.connection.client
    assert client.llen(f"{store.connection.sender.prefix}work") == 2
    for number in range(4):
        record = json.dumps({"device": "cpu", "queues": ["plan", "work"]})
        store.connection.call("beat", name=f"w{number}", record=record)
    wait_for(reaper.round, "a round", 5)
    wait_for(reaper.round, "a round", 5)
    assert client.llen(f"{store.connection.sender.prefix}work") == 5
    assert [(w.name, w.busy) for w in store.workers()] == [(f"w{n}", False) for n in range(4)]


def test_a_job_that_no_worker_can_serve_fails(
    store: JobStore, settings: Settings, reaper: Reaper
) -> None:
    request = REQUEST.model_copy(update={"output": None})
    job_id = store.submit(request, owner="me")[0].id
    reaper = Reaper(store.connection, settled(settings, no_worker_s=0.2))
    record = json.dumps({"device": "cpu", "queues": ["plan", "work"]})
    store.connection.call("beat", name="far@away", record=record)
    rounds(reaper, store, lambda: store.get(job_id).status.final, "the end")
    error = store.get(job_id).error
    assert error is not None
    assert error.code == "no_suitable_worker"


def test_what_waited_long_is_not_unserved_while_its_worker_starts_anew(
    store: JobStore, settings: Settings
) -> None:
    request = REQUEST.model_copy(update={"output": None})
    job_id = store.submit(request, owner="me")[0].id
    reaper = Reaper(store.connection, settled(settings, no_worker_s=0.5, reap_s=0.01))
    plan_queue = store.connection.client.hget(f"pissa:job:{job_id}", "plan_queue")
    near = json.dumps({"device": "cpu", "queues": ["plan", plan_queue]})
    far = json.dumps({"device": "cpu", "queues": ["plan", "work"]})
    store.connection.call("beat", name="far@away", record=far)
    store.connection.call("beat", name="near@here", record=near)
    waited = time.monotonic() + 0.7
    while time.monotonic() < waited:
        reaper.round()
        time.sleep(0.01)
    store.connection.call("leave", name="near@here")
    for _ in range(3):
        wait_for(reaper.round, "a round", 5)
    assert store.get(job_id).status is Status.QUEUED
    rounds(reaper, store, lambda: store.get(job_id).status.final, "the end")


def test_without_any_worker_a_job_waits(store: JobStore, settings: Settings) -> None:
    request = REQUEST.model_copy(update={"output": None})
    job_id = store.submit(request, owner="me")[0].id
    reaper = Reaper(store.connection, settled(settings, no_worker_s=0.01, reap_s=0.01))
    for _ in range(10):
        wait_for(reaper.round, "a round", 5)
    assert store.get(job_id).status is Status.QUEUED


def test_after_a_pause_leases_get_time_to_be_renewed(
    store: JobStore, settings: Settings, tasks: TaskStore
) -> None:
    job_id = submit(store)
    short = TaskStore(store.connection, settled(settings, lease_s=0.1), worker="paused@here")
    claim = take(short, job_id, "prepare")
    patient = Reaper(store.connection, settled(settings, renew_s=5))
    store.connection.client.set("pissa:reaper:last", 1)
    wait_for(
        lambda: (
            float(store.connection.client.zscore("pissa:leases", f"{job_id}|prepare") or 0)
            and patient.round()
        ),
        "a round",
        5,
    )
    assert tasks.look(claim) is None


def test_a_store_that_refuses_to_write_is_away_for_a_while(
    store: JobStore, settings: Settings
) -> None:
    client = store.connection.client
    client.config_set("min-replicas-to-write", 1)
    hasty = open_store(settings, patience_s=0.1)
    with pytest.raises(StoreUnavailable):
        hasty.submit(REQUEST, owner="me")
    hasty.close()
    threading.Timer(0.3, client.config_set, ("min-replicas-to-write", 0)).start()
    submit(store)
    assert store.counts()[Status.QUEUED] == 1


def test_the_rounds_go_by_themselves(
    store: JobStore, settings: Settings, pigeonhole: Pigeonhole
) -> None:
    pigeonhole.shut = True
    submit(store)
    pigeonhole.shut = False
    with Reaper(store.connection, settings):
        wait_for(lambda: pigeonhole.sent, "the message", 20)


def test_a_planned_job_keeps_its_sealed_work_while_its_lease_changes_hands(
    store: JobStore, tasks: TaskStore, connection: Connection
) -> None:
    job_id = submit(store)
    claim = take(tasks, job_id, "prepare")
    tasks.planned(claim, make_plan(), DIGEST)
    assert Plan.from_json(tasks.plan_text(job_id)) == make_plan()
    connection.client.delete(f"pissa:job:{job_id}:plan")
    assert Plan.from_json(tasks.plan_text(job_id)) == make_plan(), "it is fetched once"
    assert connection.client.smembers(f"pissa:staging:{DIGEST}") == {job_id}


@pytest.fixture
def connection(store: JobStore) -> Connection:
    return store.connection
