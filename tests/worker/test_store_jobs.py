"""What the API asks of the job store."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from store_tools import DIGEST, REQUEST, do_all, do_prepare, do_publish, do_shard, make_plan, take

from pissa_core.errors import InvalidRequest, PissaError, RankTooLarge
from worker.connect import open_store
from worker.contract import BaseToPissa, JobEvent
from worker.errors import (
    Conflict,
    IdempotencyMismatch,
    JobNotFound,
    PlanTimeout,
    StoreUnavailable,
)
from worker.settings import Settings
from worker.store import JobStore, LeaseLost, TaskStore
from worker.store.retention import Retention
from worker.terms import EventType, Phase, Status

TOKEN = "hf_" + "abcdefgh" * 4


def submit(store: JobStore, owner: str = "me", **options: str) -> str:
    return store.submit(REQUEST, owner=owner, **options)[0].id


def kinds(store: JobStore, job_id: str) -> list[str]:
    return [event.type.value for event in store.events(job_id)[0]]


def test_a_submitted_job_is_queued_with_its_defaults(store: JobStore) -> None:
    job, created = store.submit(REQUEST, owner="me")
    assert created
    assert (job.status, job.phase, job.attempts) == (Status.QUEUED, Phase.QUEUED, 0)
    assert job.request["pissa"]["rank"] == 16
    assert job.request["output"]["ref"] == "org/name-pissa"
    assert store.get(job.id) == job


def test_the_same_key_and_body_give_the_first_job(store: JobStore) -> None:
    first, created = store.submit(REQUEST, owner="me", idempotency_key="k", body_digest="b")
    again, again_created = store.submit(REQUEST, owner="me", idempotency_key="k", body_digest="b")
    other, _ = store.submit(REQUEST, owner="you", idempotency_key="k", body_digest="b")
    assert (created, again_created) == (True, False)
    assert again.id == first.id != other.id


def test_the_same_key_with_another_body_is_refused(store: JobStore) -> None:
    store.submit(REQUEST, owner="me", idempotency_key="k", body_digest="b")
    with pytest.raises(IdempotencyMismatch, match="another body"):
        store.submit(REQUEST, owner="me", idempotency_key="k", body_digest="c")


def test_an_owner_sees_only_its_own_jobs(store: JobStore) -> None:
    mine, yours = submit(store), submit(store, "you")
    assert [job.id for job in store.list(owner="me")[0]] == [mine]
    assert {job.id for job in store.list(owner=None)[0]} == {mine, yours}
    assert store.get(yours, owner="you").id == yours
    with pytest.raises(JobNotFound, match=yours):
        store.get(yours, owner="me")


def test_the_list_goes_newest_first_page_by_page(store: JobStore) -> None:
    ids = [submit(store) for _ in range(5)]
    seen, cursor = [], None
    for _ in range(3):
        page, cursor = store.list(owner="me", limit=2, after=cursor)
        seen += [job.id for job in page]
    assert seen == ids[::-1]
    assert cursor is None


def test_the_list_can_be_narrowed_to_states(store: JobStore) -> None:
    ids = [submit(store) for _ in range(4)]
    store.cancel(ids[1], discard=False)
    found, cursor = store.list(owner=None, statuses=[Status.CANCELLED], limit=1)
    assert ([job.id for job in found], cursor) == ([ids[1]], None)
    assert store.counts()[Status.QUEUED] == 3


def test_a_cursor_that_is_none_is_refused(store: JobStore) -> None:
    with pytest.raises(InvalidRequest, match="'x' is not a cursor"):
        store.list(owner=None, after="x")


def test_a_job_goes_its_way(store: JobStore, tasks: TaskStore) -> None:
    job_id = submit(store)
    do_prepare(tasks, job_id)
    planned = store.get(job_id)
    assert (planned.status, planned.phase) == (Status.RUNNING, Phase.SHARDS)
    assert (planned.progress.matrices.total, planned.progress.bytes.total) == (4, 2000)
    do_shard(tasks, job_id, 0)
    half = store.get(job_id)
    assert (half.progress.matrices.done, half.progress.shards.done) == (2, 1)
    assert half.progress.bytes.done == 1000
    assert half.eta_s is not None
    do_shard(tasks, job_id, 1)
    do_publish(tasks, job_id)
    done = store.get(job_id)
    assert (done.status, done.phase, done.eta_s) == (Status.SUCCEEDED, Phase.DONE, None)
    assert done.result is not None
    assert done.result["output"] == "hf://org/name-pissa@1"
    assert done.result["peak_memory_bytes"] == 5001
    assert set(done.result["phase_seconds"]) == {"queued", "planning", "shards", "publishing"}
    assert kinds(store, job_id) == [
        "queued", "started", "planned", "matrix_done", "matrix_done", "shard_done",
        "matrix_done", "matrix_done", "shard_done", "publishing", "succeeded",
    ]  # fmt: skip


def test_publish_becomes_a_task_with_the_last_shard_and_only_once(
    store: JobStore, tasks: TaskStore
) -> None:
    job_id = submit(store)
    do_prepare(tasks, job_id)
    do_shard(tasks, job_id, 1)
    assert tasks.claim(job_id, "publish", holder="") is None
    do_shard(tasks, job_id, 0)
    take(tasks, job_id, "publish")
    assert tasks.claim(job_id, "publish", holder="") is None


def test_rows_are_counted_once_however_often_they_are_told(
    store: JobStore, tasks: TaskStore
) -> None:
    from store_tools import row

    job_id = submit(store)
    do_prepare(tasks, job_id)
    claim = take(tasks, job_id, "shard:0")
    for _ in range(3):
        tasks.matrix_done(claim, row("s0", 1), nbytes=64, seconds=0.1, resumed=False)
    assert store.get(job_id).progress.matrices.done == 1
    assert kinds(store, job_id).count("matrix_done") == 1
    manifest = store.manifest(job_id)
    assert [entry["module"] for entry in manifest["matrices"]] == ["s0.m1"]
    assert manifest["source"] == {"ref": "hf://org/name@c0ffee", "commit": "c0ffee"}


def test_cancelling_a_queued_job_ends_it_at_once(store: JobStore, tasks: TaskStore) -> None:
    job_id = submit(store)
    assert store.cancel(job_id, discard=False).status is Status.CANCELLED
    assert store.cancel(job_id, discard=False).status is Status.CANCELLED
    assert tasks.claim(job_id, "prepare", holder="") is None


def test_a_running_job_is_cancelled_when_nothing_of_it_runs(
    store: JobStore, tasks: TaskStore
) -> None:
    job_id = submit(store)
    do_prepare(tasks, job_id)
    claim = take(tasks, job_id, "shard:0")
    assert store.cancel(job_id, discard=False).status is Status.CANCELLING
    assert tasks.claim(job_id, "shard:1", holder="") is None
    assert tasks.look(claim) == "cancelled"
    tasks.release(claim)
    assert store.get(job_id).status is Status.CANCELLING
    sweep = take(tasks, job_id, "discard")
    assert (sweep.discard, sweep.digest) == ("scratch", DIGEST)
    tasks.finish(sweep)
    assert store.get(job_id).status is Status.CANCELLED
    assert kinds(store, job_id)[-2:] == ["cancelling", "cancelled"]


def test_cancelling_again_may_still_discard(store: JobStore, tasks: TaskStore) -> None:
    job_id = submit(store)
    do_prepare(tasks, job_id)
    store.cancel(job_id, discard=False)
    tasks.finish(take(tasks, job_id, "discard"))
    assert store.cancel(job_id, discard=True).status is Status.CANCELLING
    sweep = take(tasks, job_id, "discard")
    assert sweep.discard == "all"
    assert store.get(job_id).staged
    tasks.finish(sweep)
    assert store.cancel(job_id, discard=True).status is Status.CANCELLED
    assert not store.get(job_id).staged


def test_what_another_job_may_go_on_from_is_not_discarded(
    store: JobStore, tasks: TaskStore
) -> None:
    first, second = submit(store), submit(store)
    do_prepare(tasks, first)
    do_prepare(tasks, second)
    assert store.cancel(first, discard=True).status is Status.CANCELLED
    assert store.cancel(second, discard=True).status is Status.CANCELLING
    assert take(tasks, second, "discard").discard == "all"


def test_who_discards_after_all_leaves_it_to_the_last(store: JobStore, tasks: TaskStore) -> None:
    first, second = submit(store), submit(store)
    do_prepare(tasks, first)
    do_prepare(tasks, second)
    assert store.cancel(first, discard=False).status is Status.CANCELLED
    assert store.cancel(first, discard=True).status is Status.CANCELLED
    assert store.cancel(second, discard=True).status is Status.CANCELLING
    assert take(tasks, second, "discard").discard == "all"


@pytest.mark.parametrize("verb", ["cancel", "resume"])
def test_a_job_that_succeeded_stays_so(store: JobStore, tasks: TaskStore, verb: str) -> None:
    job_id = submit(store)
    do_all(tasks, job_id)
    with pytest.raises(Conflict, match="it is succeeded"):
        store.cancel(job_id, discard=False) if verb == "cancel" else store.resume(
            job_id, hub_token=None
        )


def test_a_published_job_can_no_longer_be_cancelled(store: JobStore, tasks: TaskStore) -> None:
    job_id = submit(store)
    do_prepare(tasks, job_id, shards=1)
    do_shard(tasks, job_id, 0)
    claim = take(tasks, job_id, "publish")
    tasks.published(claim, result={}, manifest={}, peak=1)
    with pytest.raises(Conflict, match="published"):
        store.cancel(job_id, discard=True)
    tasks.finish(claim)
    assert store.get(job_id).status is Status.SUCCEEDED


def test_a_failed_job_tells_why_and_can_be_resumed(store: JobStore, tasks: TaskStore) -> None:
    job_id = submit(store)
    claim = take(tasks, job_id, "prepare")
    tasks.fail(claim, RankTooLarge("r is 99", hint="less"), discard=True)
    failed = store.get(job_id)
    assert failed.status is Status.FAILED
    assert failed.error is not None
    assert failed.error.model_dump() == {
        "code": "rank_too_large", "message": "r is 99", "hint": "less",
    }  # fmt: skip
    resumed = store.resume(job_id, hub_token=None)
    assert (resumed.status, resumed.error, resumed.finished_at) == (Status.QUEUED, None, None)
    do_all(tasks, job_id)
    assert store.get(job_id).status is Status.SUCCEEDED
    assert store.get(job_id).attempts == 2
    assert kinds(store, job_id)[:4] == ["queued", "started", "failed", "resumed"]


def test_a_job_fails_only_when_its_other_shards_have_stopped(
    store: JobStore, tasks: TaskStore
) -> None:
    job_id = submit(store)
    do_prepare(tasks, job_id)
    bad, other = take(tasks, job_id, "shard:0"), take(tasks, job_id, "shard:1")
    tasks.fail(bad, RankTooLarge("no"), discard=True)
    assert store.get(job_id).status is Status.RUNNING
    assert tasks.look(other) == "failed"
    tasks.release(other)
    tasks.finish(take(tasks, job_id, "discard"))
    assert store.get(job_id).status is Status.FAILED


def test_deleting_takes_the_kept_files_along(
    store: JobStore, tasks: TaskStore, settings: Settings
) -> None:
    job_id = submit(store, idempotency_key="k")
    with pytest.raises(Conflict, match="it is queued"):
        store.delete(job_id)
    do_all(tasks, job_id)
    kept = settings.files_dir / job_id
    kept.mkdir(parents=True)
    store.delete(job_id)
    assert not kept.exists()
    assert store.list(owner="me") == ([], None)
    for look in (store.get, store.delete):
        with pytest.raises(JobNotFound):
            look(job_id)
    left = store.connection.client.keys(f"*{job_id}*")
    assert left == []
    assert submit(store, idempotency_key="k") != job_id


def test_deleting_a_failed_job_has_its_staging_swept(store: JobStore, tasks: TaskStore) -> None:
    job_id = submit(store)
    do_prepare(tasks, job_id, shards=1)
    tasks.fail(take(tasks, job_id, "shard:0"), PissaError("broken"), discard=False)
    store.delete(job_id)
    with pytest.raises(JobNotFound):
        store.get(job_id)
    sweep = take(tasks, job_id, "discard")
    assert sweep.discard == "all"
    tasks.finish(sweep)
    assert store.connection.client.keys(f"*{job_id}*") == []


def test_the_hub_token_is_unreadable_and_erased_at_the_end(
    store: JobStore, tasks: TaskStore, settings: Settings
) -> None:
    from worker.vault import open_vault

    job_id = submit(store, hub_token=TOKEN)
    claim = take(tasks, job_id, "prepare")
    assert open_vault(settings).open(claim.sealed_token) == TOKEN
    tasks.planned(claim, make_plan(shards=1), DIGEST)
    on_disk = [path for path in (settings.data_dir / "valkey").rglob("*") if path.is_file()]
    assert not [path for path in on_disk if TOKEN.encode() in path.read_bytes()]
    tasks.fail(take(tasks, job_id, "shard:0"), PissaError("broken"), discard=False)
    assert store.connection.client.hget(f"pissa:job:{job_id}", "token") is None


def test_events_come_in_pages(store: JobStore, tasks: TaskStore) -> None:
    job_id = submit(store)
    do_all(tasks, job_id)
    everything, end = store.events(job_id)
    assert end is None
    first, cursor = store.events(job_id, limit=3)
    rest, end = store.events(job_id, after=cursor)
    assert [event.id for event in first + rest] == [event.id for event in everything]
    assert end is None
    assert store.events(job_id, after=everything[-1].id) == ([], None)


def test_a_running_jobs_events_can_be_asked_on(store: JobStore, tasks: TaskStore) -> None:
    job_id = submit(store)
    _, cursor = store.events(job_id)
    assert store.events(job_id, after=cursor) == ([], cursor)
    take(tasks, job_id, "prepare")
    assert [event.type for event in store.events(job_id, after=cursor)[0]] == [EventType.STARTED]


def test_following_ends_with_the_job(store: JobStore, tasks: TaskStore) -> None:
    job_id = submit(store)

    async def follow() -> list[JobEvent]:
        return [event async for event in store.follow(job_id, after=None)]

    async def both() -> list[JobEvent]:
        following = asyncio.create_task(follow())
        await asyncio.to_thread(do_all, tasks, job_id)
        return await asyncio.wait_for(following, 30)

    followed = asyncio.run(both())
    assert [event.type.value for event in followed] == kinds(store, job_id)
    assert asyncio.run(follow()) == followed


def test_following_passes_over_an_end_that_was_not_the_last(
    store: JobStore, tasks: TaskStore
) -> None:
    job_id = submit(store)
    store.cancel(job_id, discard=False)
    store.resume(job_id, hub_token=None)
    do_all(tasks, job_id)

    async def follow() -> list[str]:
        return [event.type.value async for event in store.follow(job_id, after=None)]

    assert asyncio.run(asyncio.wait_for(follow(), 30)) == kinds(store, job_id)


def test_a_plan_comes_back_to_who_asked(store: JobStore, tasks: TaskStore) -> None:
    plan_id = store.request_plan(BaseToPissa(model="org/name"), hub_token=None)
    with pytest.raises(PlanTimeout, match=r"within 0\.05 s"):
        store.plan_result(plan_id, timeout_s=0.05)
    claim = take(tasks, plan_id, "plan")
    tasks.finish(claim, {"source": "hf://org/name@c0ffee"})
    assert store.plan_result(plan_id, timeout_s=5) == {"source": "hf://org/name@c0ffee"}
    assert store.list(owner=None) == ([], None)
    assert 0 < store.connection.client.ttl(f"pissa:job:{plan_id}") <= 600


def test_a_plan_in_the_making_is_waited_for_quietly(store: JobStore, tasks: TaskStore) -> None:
    plan_id = store.request_plan(BaseToPissa(model="org/name"), hub_token=None)
    take(tasks, plan_id, "plan")
    with pytest.raises(PlanTimeout):
        store.plan_result(plan_id, timeout_s=0.3)
    asked = store.connection.client.info("commandstats")["cmdstat_xread"]["calls"]
    assert asked <= 3


def test_a_plan_that_cannot_be_made_raises_what_the_planner_met(
    store: JobStore, tasks: TaskStore
) -> None:
    plan_id = store.request_plan(BaseToPissa(model="org/name"), hub_token=None)
    tasks.fail(take(tasks, plan_id, "plan"), RankTooLarge("r is 99", hint="less"), discard=False)
    with pytest.raises(RankTooLarge, match="r is 99") as raised:
        store.plan_result(plan_id, timeout_s=5)
    assert raised.value.hint == "less"


def test_a_task_refuses_a_stranger(store: JobStore, tasks: TaskStore) -> None:
    import dataclasses

    job_id = submit(store)
    claim = take(tasks, job_id, "prepare")
    stranger = dataclasses.replace(claim, token="stolen")
    for write in (
        lambda: tasks.renew(stranger),
        lambda: tasks.release(stranger),
        lambda: tasks.planned(stranger, make_plan(), DIGEST),
        lambda: tasks.fail(stranger, PissaError("no"), discard=True),
        lambda: tasks.retry(stranger, PissaError("no"), restart=False),
    ):
        with pytest.raises(LeaseLost):
            write()
    assert tasks.look(claim) is None
    assert store.get(job_id).status is Status.RUNNING


def test_a_store_that_is_away_is_said_so(tmp_path: Path) -> None:
    settings = Settings(redis_url=f"unix://{tmp_path}/nothing.sock", data_dir=tmp_path)
    store = open_store(settings, patience_s=0.1)
    for ask in (store.ping, lambda: store.submit(REQUEST, owner="me"), store.workers):
        with pytest.raises(StoreUnavailable, match="does not answer"):
            ask()
    store.close()


def test_finished_jobs_go_after_their_time_and_others_stay(
    store: JobStore, tasks: TaskStore, settings: Settings
) -> None:
    done, waiting, resumed = submit(store), submit(store), submit(store)
    do_all(tasks, done)
    store.cancel(resumed, discard=False)
    store.resume(resumed, hub_token=None)
    kept = settings.files_dir / done
    kept.mkdir(parents=True)
    assert store.delete_finished(older_s=3600) == 0
    assert store.get(done).status is Status.SUCCEEDED
    assert store.delete_finished(older_s=0) == 1
    assert not kept.exists()
    assert [job.id for job in store.list(owner="me")[0]] == [resumed, waiting]
    assert store.delete_finished(older_s=0) == 0


def test_retention_sweeps_by_itself(store: JobStore, tasks: TaskStore, settings: Settings) -> None:
    done = submit(store)
    do_all(tasks, done)
    with Retention(store, settings.model_copy(update={"keep_s": 0.2})):
        for _ in range(200):
            if not store.list(owner="me")[0]:
                return
            time.sleep(0.02)
    pytest.fail("the finished job is still there")
