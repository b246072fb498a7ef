"""One worker: its two Celery nodes as child processes, its heartbeat and its share of mending."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import psutil

from worker.connect import connect
from worker.errors import StoreUnavailable
from worker.logs import configure_logging
from worker.node import Node, Role
from worker.places import storages
from worker.processes import dies_with_parent
from worker.settings import Settings
from worker.store.connection import Connection
from worker.store.reaper import Reaper
from worker.sweeping import Sweeper

_GATES = "pissa-worker-"
_POLL_S = 0.2
_FIRST_DELAY_S, _LONGEST_DELAY_S, _STEADY_S = 0.5, 30.0, 60.0
logger = logging.getLogger(__name__)


def run_worker(settings: Settings, *, device: str, slots: int | None) -> None:
    """Work for the store at `settings.redis_url` until SIGTERM or SIGINT.

    Call it from the main thread. A task in hand is given back between two matrices, or when
    `stop_s` is over; the processes started here end with this one, however it ends.
    """
    stopping = _stop_on_signals()
    configure_logging("worker")
    with _folder_of_gates() as gates:
        worker = _Worker(settings, device, slots, gates)
        with Reaper(worker.connection, settings), Sweeper(worker.connection, settings):
            worker.run(stopping)
        worker.connection.close()


@contextmanager
def _folder_of_gates() -> Iterator[Path]:
    """Make a folder for the gates that this worker's processes share; remove those of the dead."""
    for left in Path(gettempdir()).glob(f"{_GATES}*-*"):
        pid = left.name.removeprefix(_GATES).partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(prefix=f"{_GATES}{os.getpid()}-") as folder:
        yield Path(folder)


@dataclass
class _Child:
    node: Node
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    due: float = 0.0
    delay_s: float = field(default=_FIRST_DELAY_S)


class _Worker:
    def __init__(self, settings: Settings, device: str, slots: int | None, gates: Path) -> None:
        self._settings = settings
        self._device = device
        self.connection: Connection = connect(settings)
        self.name = f"{device.replace(':', '')}-{os.getpid()}@{socket.gethostname()}"
        suffixes = storages(settings).queues
        queues: dict[Role, list[str]] = {
            "planner": [f"plan{suffix}" for suffix in suffixes],
            "compute": [f"work{suffix}" for suffix in suffixes],
        }
        self._queues = [name for names in queues.values() for name in names]
        # What a node that is killed leaves among temporary files goes with its worker.
        self._own = {**_THREADS, "TMPDIR": str(gates)}
        self._children = [
            _Child(
                Node(
                    role=role,
                    worker=self.name,
                    device=device,
                    slots=slots,
                    queues=",".join(names),
                    parent=os.getpid(),
                    gates=gates,
                )
            )
            for role, names in queues.items()
        ]

    def run(self, stopping: threading.Event) -> None:
        beats = threading.Thread(target=self._beat, args=(stopping,), daemon=True)
        beats.start()
        try:
            # All children are started by this thread: theirs is the death signal of a thread.
            while not stopping.is_set():
                for child in self._children:
                    self._tend(child)
                stopping.wait(_POLL_S)
        finally:
            stopping.set()
            self._stop()
            beats.join(timeout=1)
            self._leave()

    def _tend(self, child: _Child) -> None:
        now = time.monotonic()
        if child.process is not None:
            status = child.process.poll()
            if status is None:
                return
            steady = now - child.started > _STEADY_S
            child.delay_s = _FIRST_DELAY_S if steady else min(2 * child.delay_s, _LONGEST_DELAY_S)
            child.process, child.due = None, now + child.delay_s
            logger.error("the %s ended with status %s", child.node.role, status)
        if now >= child.due:
            child.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "worker.node"],
                env=os.environ | self._settings.as_env() | child.node.as_env() | self._own,
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
            child.started = now

    def _beat(self, stopping: threading.Event) -> None:
        record = json.dumps({"device": self._device, "queues": self._queues})
        while True:
            try:
                self.connection.call("beat", name=self.name, record=record)
            except StoreUnavailable:
                logger.warning("the store is away")
            if stopping.wait(min(self._settings.renew_s, 5)):
                return

    def _stop(self) -> None:
        running = [child.process for child in self._children if child.process is not None]
        deadline = time.monotonic() + self._settings.stop_s
        try:
            self.connection.call("drain", name=self.name)
        except StoreUnavailable:
            logger.warning("the store is away; tasks are given back when their leases run out")
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(max(deadline - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                # Its own children get the kernel's death signal.
                process.kill()
                process.wait()

    def _leave(self) -> None:
        try:
            Reaper(self.connection, self._settings).hand_back(self.name)
            self.connection.call("leave", name=self.name)
        except StoreUnavailable:
            logger.warning("the store is away; this worker's leases run out by themselves")


# BLAS threads are pinned before any library counts the cores: a matrix is one thread's work.
_THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _stop_on_signals() -> threading.Event:
    stopping = threading.Event()
    # `pissa serve` starts its workers on a leash. One that a shell started outlives the shell.
    parent, leashed = os.getppid(), dies_with_parent()

    def stop(signum: int, frame: object) -> None:
        if leashed and os.getppid() != parent:
            # Nobody is left to wait for a graceful end, and the store may be gone too.
            os._exit(1)
        stopping.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    return stopping
