"""Holding a task: what the thread that renews the lease leaves behind."""

from __future__ import annotations

import signal
import threading

import psutil
from store_tools import REQUEST, take
from worker_tools import wait_for

from worker.holding import Hold
from worker.settings import Settings
from worker.store import JobStore, TaskStore


def test_a_question_under_way_is_over_when_the_block_is(
    store: JobStore, tasks: TaskStore, settings: Settings
) -> None:
    """Else it finds its connection closed under it, and raises what nobody expects."""
    job, _ = store.submit(REQUEST, owner="me")
    claim = take(tasks, job.id, "prepare")
    client = store.connection.client
    server = psutil.Process(int(client.info("server")["process_id"]))
    asked = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    with Hold(tasks, claim, settings):
        wait_for(
            lambda: client.info("commandstats")["cmdstat_evalsha"]["calls"] > asked, "a question"
        )
        server.suspend()
        awake = threading.Timer(5 * settings.watch_s, server.send_signal, [signal.SIGCONT])
        awake.start()
        threading.Event().wait(2 * settings.watch_s)  # now the next question is under way
    assert "lease" not in [thread.name for thread in threading.enumerate()]
    awake.join()
