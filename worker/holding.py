"""Holding a task: a thread renews its lease and watches whether to leave it."""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import ExitStack
from types import TracebackType

from pissa_core.leaving import CalledOff, leaving_on
from worker.errors import StoreUnavailable
from worker.settings import Settings
from worker.store.tasks import Claim, LeaseLost, Stop, TaskStore

_FAREWELL_S = 5.0
logger = logging.getLogger(__name__)


class Stopped(Exception):
    """The task should be left: its job is ending, or this worker is."""


class Hold:
    """Keeps the lease of one task while the block is open.

    The work asks `check` between matrices, and its waits for the Hub end when it is to be left.
    Work that does not come to a matrix's end in time (a huge matrix, a slow download) is ended
    from outside: the process leaves, the lease is taken back, and what is journalled stays.
    """

    def __init__(self, tasks: TaskStore, claim: Claim, settings: Settings) -> None:
        """Prepare; the block begins the renewals."""
        self._tasks = tasks
        self._claim = claim
        self._settings = settings
        self._done = threading.Event()
        self._leave = threading.Event()
        self._waits = ExitStack()
        self._why: Stop | None = None
        self._lost = False
        self._thread = threading.Thread(target=self._watch, name="lease", daemon=True)

    def __enter__(self) -> Hold:
        """Begin to renew."""
        self._waits.enter_context(leaving_on(self._leave, at_once=True))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop renewing; what follows must be written within one lease.

        A question under way is waited for, within reason: whoever closes the connection next must
        not find it in use.
        """
        self._done.set()
        self._thread.join(timeout=_FAREWELL_S)
        self._waits.close()
        if kind is CalledOff:
            self.check()

    def check(self, answer: Stop | None = None) -> None:
        """Go on, or leave the task.

        Raises:
            Stopped: if the store's answer, or the watch, says to leave.
            LeaseLost: if another has the task.
        """
        if self._lost:
            raise LeaseLost(self._claim.task)
        why = answer or self._why
        if why is not None:
            raise Stopped(why.value)

    def _watch(self) -> None:
        renewed = time.monotonic()
        while not self._done.wait(self._settings.watch_s):
            try:
                if time.monotonic() - renewed >= self._settings.renew_s:
                    why = self._tasks.renew(self._claim)
                    renewed = time.monotonic()
                else:
                    why = self._tasks.look(self._claim)
            except LeaseLost:
                self._lost = True
                why = None
            except StoreUnavailable:
                continue
            if self._lost or why is not None:
                self._why = why
                if self._lost or self._still_ours():
                    self._leave.set()
                self._leave_in_time(why)
                return

    def _leave_in_time(self, why: Stop | None) -> None:
        # A worker that is stopping has a grace of its own, kept by the process above.
        if why is Stop.DRAIN or self._done.wait(self._settings.cancel_s):
            return
        if (self._lost or self._still_ours()) and not self._done.is_set():
            logger.warning("the task does not come to an end; this process does")
            os._exit(1)

    def _still_ours(self) -> bool:
        # Published meanwhile, it must not be cut short.
        try:
            return self._tasks.look(self._claim) is not None
        except (LeaseLost, StoreUnavailable):
            return True
