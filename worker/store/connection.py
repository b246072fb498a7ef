"""The connection to Valkey: one script for all operations, patience, plain errors.

Every operation is one Lua script (`lua/`), so it happens whole or not at all, and each can be
sent again when its answer was lost on the way: what carries a lease's token or an id made here
finds its own trace and changes nothing twice.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any, Protocol, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker.errors import StoreUnavailable
from worker.terms import Task

_PARTS = ("common", "ending", "jobs", "tasks", "reaper", "dispatch")
_AWAY = (redis.ConnectionError, redis.TimeoutError, redis.exceptions.ReadOnlyError)
_REFUSALS = ("MISCONF", "NOREPLICAS", "MASTERDOWN")
"""How a server begins to answer whose disk is full, or that has lost replicas or its primary."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0

Answer = TypeVar("Answer")
logger = logging.getLogger(__name__)


class Sender(Protocol):
    """What carries a task's ids to a worker; see `worker.queue.Queue`."""

    prefix: str
    """What the broker's keys begin with, before a queue's name."""

    def enqueue(self, task: Task, *args: str | int, queue: str, task_id: str) -> None:
        """Send one message; may raise anything, since a message not sent is sent again later."""


class Connection:
    """A client of the store that waits out short absences, and the sender of its messages."""

    def __init__(self, url: str, sender: Sender, *, patience_s: float) -> None:
        """Connect lazily; nothing is opened before the first call.

        Args:
            url: ``redis://``, ``rediss://`` or ``unix://``.
            sender: sends what an operation made ready.
            patience_s: how long a call is tried again while the store is away.
        """
        self.url = url
        self.sender = sender
        self._patience_s = patience_s
        self.client = redis.Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=20.0,
            socket_connect_timeout=5.0,
            health_check_interval=25,
            retry=Retry(NoBackoff(), 0),
        )
        self._script = self.client.register_script(_source())

    def call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Run an operation and send the messages it asks for; None arguments are left out.

        Raises:
            StoreUnavailable: if the store stays away longer than the patience lasts.
        """
        given = {name: value for name, value in arguments.items() if value is not None}
        text = self.ask(lambda: self._script(args=[operation, json.dumps(given)]))
        answer: dict[str, Any] = json.loads(text) or {}
        for entry in answer.pop("send", ()):
            self.send(entry["id"], entry["task"], entry["queue"])
        return answer

    def ask(self, command: Callable[[], Answer]) -> Answer:
        """Run a command of the client, with patience.

        Raises:
            StoreUnavailable: as `call` does.
        """
        deadline = time.monotonic() + self._patience_s
        pause = _FIRST_PAUSE_S
        while True:
            try:
                return command()
            except redis.exceptions.OutOfMemoryError as error:
                raise StoreUnavailable(
                    "the job store has no memory left", hint="delete finished jobs, or give it more"
                ) from error
            except redis.RedisError as error:
                if not _is_away(error):
                    raise
                if time.monotonic() + pause > deadline:
                    raise _unavailable() from error
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def send(self, job_id: str, task: str, queue: str) -> None:
        """Send the message of one task; a failure is the reaper's to mend."""
        kind, _, index = task.partition(":")
        arguments = (job_id, int(index)) if index else (job_id,)
        try:
            self.sender.enqueue(
                Task(f"pissa.{kind}"), *arguments, queue=queue, task_id=f"{job_id}|{task}"
            )
        except Exception:  # noqa: BLE001 - whatever the broker's client raises: sent again later
            told = {"job_id": job_id, "task": task}
            logger.warning("the message was not sent; it will be", extra=told)

    def close(self) -> None:
        """Close every connection."""
        self.client.close()


def _is_away(error: redis.RedisError) -> bool:
    """Whether waiting may help: nobody answers, or one who cannot write at present."""
    return isinstance(error, _AWAY) or str(error).startswith(_REFUSALS)


def _unavailable() -> StoreUnavailable:
    return StoreUnavailable(
        "the job store does not answer", hint="try again shortly; no accepted job is lost"
    )


def _source() -> str:
    folder = files("worker.store") / "lua"
    return "\n".join((folder / f"{part}.lua").read_text() for part in _PARTS)
