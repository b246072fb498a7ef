"""The faults themselves, each a function of the running service."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil
import redis
from household import Household, store_of
from worker_tools import kill_tree

from worker.queue import Queue
from worker.terms import Task


@dataclass(frozen=True)
class Fault:
    """One fault: what, when it begins, how long it lasts where it lasts, and of which worker."""

    kind: str
    at_s: float
    for_s: float
    which: int


def inflict(home: Household, fault: Fault) -> None:
    """Do what the fault says; what lasts goes on while `Household.tend` is called."""
    _, how = FAULTS[fault.kind]
    how(home, fault)


def _kill_child(home: Household, fault: Fault) -> None:
    """Kill the process that holds a task; where none does, any child of a node."""
    victim = _holder(home)
    if victim is None:
        children = [child for node in _nodes(home, fault) for child in _below(node)]
        victim = children[0].pid if children else None
    if victim is not None:
        with suppress(psutil.Error):
            psutil.Process(victim).kill()


def _holder(home: Household) -> int | None:
    client = store_of(home)
    try:
        for member in client.zrange("pissa:leases", 0, -1):
            job_id, _, task = str(member).partition("|")
            text = client.hget(f"pissa:job:{job_id}:tasks", task)
            holder = json.loads(str(text)).get("holder") if text else None
            if holder:
                return int(holder.split("/")[1])
    except (redis.ConnectionError, redis.exceptions.BusyLoadingError):
        return None
    finally:
        client.close()
    return None


def _kill_node(home: Household, fault: Fault) -> None:
    nodes = _nodes(home, fault)
    if nodes:
        with suppress(psutil.Error):
            nodes[int(fault.at_s * 10) % len(nodes)].kill()


def _nodes(home: Household, fault: Fault) -> list[psutil.Process]:
    worker = home.workers[fault.which]
    return _below(psutil.Process(worker.pid)) if worker.alive else []


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children()
    except psutil.Error:
        return []


def _kill_worker(home: Household, fault: Fault) -> None:
    home.workers[fault.which].kill()


def _kill_api(home: Household, fault: Fault) -> None:
    home.api.kill()


def _kill_valkey(home: Household, fault: Fault) -> None:
    home.valkey.kill()
    home.valkey.start()


def _valkey_away(home: Household, fault: Fault) -> None:
    home.valkey.kill()
    home.valkey.due = time.monotonic() + fault.for_s


def _valkey_asleep(home: Household, fault: Fault) -> None:
    home.sleep(home.valkey, fault.for_s)


def _worker_asleep(home: Household, fault: Fault) -> None:
    home.sleep(home.workers[fault.which], fault.for_s)


def _messages_twice(home: Household, fault: Fault) -> None:
    """Send the message of every task there is, done, running or waiting, once more."""
    client, queue = store_of(home), Queue(str(home.settings.redis_url))
    with suppress(redis.ConnectionError, redis.exceptions.BusyLoadingError):
        for key in client.scan_iter("pissa:job:*:tasks"):
            job_id = str(key).split(":")[2]
            plan_queue, work_queue = client.hmget(f"pissa:job:{job_id}", "plan_queue", "work_queue")
            for name in client.hkeys(str(key)):
                kind, _, index = str(name).partition(":")
                arguments = (job_id, int(index)) if index else (job_id,)
                task, where = Task(f"pissa.{kind}"), plan_queue if kind == "prepare" else work_queue
                with suppress(Exception):
                    queue.enqueue(task, *arguments, queue=str(where), task_id=f"{job_id}|{name}")
    client.close()
    queue.close()


def _stop_worker(home: Household, fault: Fault) -> None:
    worker = home.workers[fault.which]
    if worker.alive:
        kill_tree(worker.pid, signal.SIGCONT)
        assert worker.process is not None
        worker.process.terminate()


def _third_worker(home: Household, fault: Fault) -> None:
    if len(home.workers) < 3:
        home.add_worker()


def _hub_asleep(home: Household, fault: Fault) -> None:
    home.sleep(home.hub, fault.for_s)


def _kill_everything(home: Household, fault: Fault) -> None:
    # The Hub is somebody else's, and forgets nothing.
    for part in home.parts:
        if part is not home.hub:
            part.kill()


FAULTS: Mapping[str, tuple[int, Callable[[Household, Fault], None]]] = {
    "kill a worker's child": (4, _kill_child),
    "kill a worker's node": (2, _kill_node),
    "kill a worker": (3, _kill_worker),
    "kill the API": (3, _kill_api),
    "kill Valkey": (3, _kill_valkey),
    "Valkey away for seconds": (2, _valkey_away),
    "Valkey asleep": (1, _valkey_asleep),
    "worker asleep beyond its lease": (3, _worker_asleep),
    "messages twice": (2, _messages_twice),
    "worker stopped by SIGTERM": (2, _stop_worker),
    "third worker for a while": (1, _third_worker),
    "Hub asleep": (2, _hub_asleep),
    "kill everything": (1, _kill_everything),
}
"""How often each kind comes, relative to the others, and what it does."""
