"""What mends by going round: leases of the dead, tasks never sent, retries that are due.

It runs in the API and in every worker; a lock in the store lets one of them do a round.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from typing import Any

from pissa_core.errors import (
    AttemptsExhausted,
    NoSuitableWorker,
    OutOfMemory,
    PissaError,
    WorkerLost,
)
from worker.errors import PlanTimeout
from worker.processes import holder_id, is_dead
from worker.rounds import Rounds
from worker.settings import Settings
from worker.store.connection import Connection

_UNWANTED_PLAN_S = 600
_FORGET_WORKER_AFTER = 3  # leases without a heartbeat
logger = logging.getLogger(__name__)


class Reaper(Rounds):
    """Rounds, one every `reap_s`, in a thread of their own while the block is open."""

    def __init__(self, connection: Connection, settings: Settings) -> None:
        """Prepare; `round` may also be called by itself."""
        super().__init__("reaper", pause_s=settings.reap_s)
        self._connection = connection
        self._settings = settings
        self._seen_dead: frozenset[str] = frozenset()

    def round(self) -> bool:
        """Go round once; False if another process is at it.

        Raises:
            StoreUnavailable: if the store is away.
        """
        settings, call = self._settings, self._connection.call
        answer = call(
            "round",
            by=holder_id(),
            period_ms=max(1, int(settings.reap_s * 900)),
            pause_ms=int((settings.reap_s + settings.renew_s) * 1000),
            grace_ms=int(1.5 * settings.renew_s * 1000),
        )
        if answer.get("busy"):
            return False
        self._take_back_leases()
        served = self._served_queues()
        self._send_again(served)
        return True

    def take_back_from_dead(self, *, out_of_memory: bool) -> None:
        """Take back what dead processes of this machine held, by who knows how they died."""
        for lease in self._leases():
            if is_dead(lease["holder"]):
                error = _ran_out(lease) if out_of_memory else _worker_lost(lease, how="died")
                self._take_back(lease, error, dead=True)

    def hand_back(self, worker: str) -> None:
        """Give back, unharmed, what a worker held that was asked to stop and has."""
        for lease in self._leases():
            if lease["worker"] == worker:
                names = {name: lease[name] for name in ("id", "task", "token", "worker")}
                self._connection.call("release", **names)

    def _take_back_leases(self) -> None:
        dead = set()
        for lease in self._leases():
            if lease["expired"]:
                self._take_back(lease, _worker_lost(lease, how="fell silent"), dead=False)
            elif is_dead(lease["holder"]):
                dead.add(lease["token"])
                # The node above the dead process knows how it died, and has one round to say so.
                if lease["token"] in self._seen_dead:
                    self._take_back(lease, _worker_lost(lease, how="died"), dead=True)
        self._seen_dead = frozenset(dead)

    def _leases(self) -> list[dict[str, Any]]:
        return self._connection.call("leases")["leases"] or []

    def _take_back(self, lease: dict[str, Any], error: PissaError, *, dead: bool) -> None:
        told = {"job_id": lease["id"], "task": lease["task"]}
        logger.warning("taken back: %s", error.message, extra=told)
        self._connection.call(
            "lose",
            id=lease["id"],
            task=lease["task"],
            token=lease["token"],
            dead=dead,
            code=error.code,
            error=json.dumps(error.as_dict()),
            exhausted=json.dumps(_exhausted(error, self._settings.max_losses).as_dict()),
            max_losses=self._settings.max_losses,
        )

    def _served_queues(self) -> list[str]:
        """Forget silent workers; tell each queue how many messages may wait in it."""
        served: list[str] = []
        for entry in self._connection.call("workers")["workers"] or ():
            silent_s = entry["ago_ms"] / 1000
            if silent_s > _FORGET_WORKER_AFTER * self._settings.lease_s:
                self._connection.call("leave", name=entry["name"])
            elif silent_s <= self._settings.lease_s:
                served += json.loads(entry["record"])["queues"]
        windows = {queue: served.count(queue) + 1 for queue in served}
        if windows:
            self._connection.call("windows", windows=windows)
        return served

    def _send_again(self, served: Collection[str]) -> None:
        forgotten = PlanTimeout("the plan was not made in time, and nobody waits for it any more")
        overdue = self._connection.call(
            "overdue",
            resend_ms=int(2000 * self._settings.reap_s),
            plan_ms=_UNWANTED_PLAN_S * 1000,
            error=json.dumps(forgotten.as_dict()),
        )["overdue"]
        for entry in overdue or ():
            job_id, task, queue = entry["id"], entry["task"], entry["queue"]
            if self._is_unserved(entry, served):
                error = json.dumps(_no_suitable_worker(self._settings.no_worker_s).as_dict())
                self._connection.call("unserved", id=job_id, task=task, error=error)
            elif not self._is_waiting(queue, f"{job_id}|{task}"):
                logger.info("the message is sent again", extra={"job_id": job_id, "task": task})
                self._connection.send(job_id, task, queue)
                self._connection.call("resent", id=job_id, task=task, queue=queue)

    def _is_unserved(self, entry: dict[str, Any], served: Collection[str]) -> bool:
        # Where no worker runs at all, one may be about to; where others run and none shares the
        # storage, waiting on is in vain.
        queue, others = entry["queue"], bool(served)
        waited = entry["waited_ms"] > 1000 * self._settings.no_worker_s
        return waited and others and "." in queue and queue not in served

    def _is_waiting(self, queue: str, task_id: str) -> bool:
        """Whether the queue still holds the message; the window keeps queues short."""
        client, key = self._connection.client, f"{self._connection.sender.prefix}{queue}"
        messages: Any = self._connection.ask(lambda: client.lrange(key, 0, -1))
        quoted = json.dumps(task_id)
        return any(quoted in message for message in messages)


def _ran_out(lease: dict[str, Any]) -> OutOfMemory:
    return OutOfMemory(
        f"the system killed the worker {lease['worker']} for want of memory at {lease['task']}",
        hint="use fewer slots, or a machine with more memory",
    )


def _worker_lost(lease: dict[str, Any], *, how: str) -> WorkerLost:
    return WorkerLost(
        f"the worker {lease['worker']} {how} while it was at {lease['task']}",
        hint="if this happens again the machine may be short of memory; see the worker's log",
    )


def _exhausted(last: PissaError, losses: int) -> AttemptsExhausted:
    return AttemptsExhausted(
        f"{last.message}: the last of {losses} workers that the task lost, as many as allowed",
        hint="see the workers' logs; resuming goes on from what is sealed",
    )


def _no_suitable_worker(waited_s: float) -> NoSuitableWorker:
    return NoSuitableWorker(
        f"no worker that shares the service's storage has taken the job within {waited_s:g} s",
        hint="give a worker the same data folder and local root, or use an output on the Hub",
    )
