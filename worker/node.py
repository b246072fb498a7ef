"""One of the two Celery nodes of a worker: ``python -m worker.node``, started by `worker.main`.

The planner consumes the plan queues and is the only process that imports transformers; the
compute node consumes the work queues. Apart, a plan never waits behind a shard, and the memory
of a conversion does not hold the libraries it has no use for.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

from billiard.util import _run_finalizers
from celery import Celery, signals
from celery.concurrency.prefork import TaskPool
from celery.exceptions import SecurityWarning, WorkerLostError
from pydantic_settings import BaseSettings, SettingsConfigDict

from pissa_core.plan import IN_FLIGHT
from worker.celery_app import make_app
from worker.connect import connect
from worker.errors import StoreUnavailable
from worker.logs import configure_logging
from worker.processes import die_with_parent, oom_kills
from worker.settings import Settings
from worker.store.reaper import Reaper

_LOOK_AFTER_CHILDREN_S = 0.5
Role = Literal["planner", "compute"]
_PRELOADED: dict[str, tuple[str, ...]] = {
    "compute": ("pissa_core.engine",),
    "planner": ("pissa_core.engine", "transformers", "peft"),
}
logger = logging.getLogger(__name__)


class Node(BaseSettings):
    """What a node is told by the process that starts it, as ``PISSA_NODE_<NAME>``."""

    model_config = SettingsConfigDict(env_prefix="PISSA_NODE_", frozen=True, extra="ignore")

    role: Role
    worker: str
    device: str = "auto"
    slots: int | None = None
    queues: str
    parent: int
    gates: Path | None = None

    def as_env(self) -> dict[str, str]:
        """Return the variables that a child reads."""
        values = self.model_dump(exclude_none=True)
        return {f"PISSA_NODE_{name.upper()}": str(value) for name, value in values.items()}


def main() -> None:
    """Consume until SIGTERM, then finish what runs."""
    die_with_parent()
    node, settings = Node(), Settings.from_env()
    if os.getppid() != node.parent:
        sys.exit("the worker that started this node has gone")
    signals.setup_logging.connect(log_as_node, weak=False)
    log_as_node()
    app = make_app(_url(settings))
    app.conf.worker_pool_start_method = start_method(node)
    if app.conf.worker_pool_start_method == "fork":
        # Loaded before the fork, so that a child that has to be replaced is there at once.
        for module in _PRELOADED[node.role]:
            importlib.import_module(module)
    _watch_children(settings)
    status = _consume(app, node)
    logging.shutdown()
    _run_finalizers()  # the pool's temporary folders
    # Taking torch apart object by object takes seconds, and there is nothing left to save.
    os._exit(status)


def start_method(node: Node) -> str:
    """Choose how children start: CUDA does not survive a fork."""
    if node.role == "planner" or node.device == "cpu":
        return "fork"
    gpu = node.device.startswith("cuda") or Path("/dev/nvidiactl").exists()
    return "spawn" if gpu else "fork"


def _consume(app: Celery, node: Node) -> int:
    controller = app.Worker(
        hostname=f"{node.role}.{node.worker}",
        queues=node.queues.split(","),
        pool=_AttentivePool,
        concurrency=IN_FLIGHT if node.role == "compute" else 1,
        loglevel="INFO",
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    )
    controller.start()
    return int(controller.exitcode or 0)


class _AttentivePool(TaskPool):  # type: ignore[misc]  # Celery has no types
    """A prefork pool that notices a dead child within half a second, not five."""

    def register_with_event_loop(self, loop: Any) -> None:
        super().register_with_event_loop(loop)
        loop.call_repeatedly(_LOOK_AFTER_CHILDREN_S, self._pool.maintain_pool)


def _watch_children(settings: Settings) -> None:
    """Take back at once what a child held when it died, instead of when its lease runs out."""
    # Messages are JSON, so being root is no danger of the kind that Celery warns of.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    connection = connect(settings)
    reaper = Reaper(connection, settings)
    kills = oom_kills()

    def on_failure(exception: BaseException | None = None, **_: Any) -> None:
        nonlocal kills
        if not isinstance(exception, WorkerLostError):
            return
        before, kills = kills, oom_kills()
        try:
            reaper.take_back_from_dead(out_of_memory=kills > before)
        except StoreUnavailable:
            logger.warning("the store is away; the reaper will take back what the child held")

    signals.task_failure.connect(on_failure, weak=False)


def log_as_node(**_: Any) -> None:
    """Log as our node does; having a receiver that does so, Celery leaves the logging alone."""
    node = Node()
    configure_logging(f"{node.role} of {node.worker}")


def _url(settings: Settings) -> str:
    if settings.redis_url is None:
        sys.exit("PISSA_REDIS_URL is not set")
    return settings.redis_url


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started us
    main()
