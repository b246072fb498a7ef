"""The Celery app and its settings; the store is the truth about jobs, messages carry ids only."""

from __future__ import annotations

from typing import Any

from celery import Celery

KEY_PREFIX = "pissa:celery:"


def make_app(url: str) -> Celery:
    """Return an app whose broker is the store at `url`; it keeps no results.

    Messages are acknowledged early: the lease in the store, not the message, says who works on
    what, and the reaper sends again what a dead worker held. So no message stays unacknowledged
    for long, and none comes back by itself while its task runs.
    """
    app = Celery("pissa", set_as_current=False)
    app.conf.update(
        broker_url=broker_url(url),
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options=_transport_options(url),
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_acks_late=False,
        task_reject_on_worker_lost=False,
        task_create_missing_queues=True,
        task_serializer="json",
        accept_content=["json"],
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        imports=("worker.tasks",),
    )
    return app


def broker_url(url: str) -> str:
    """Spell a store's URL as kombu does: ``unix://`` is ``redis+socket://`` there."""
    if url.startswith("unix://"):
        return "redis+socket://" + url.removeprefix("unix://").replace("?db=", "?virtual_host=")
    return url


def _transport_options(url: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "visibility_timeout": 86400,
        "health_check_interval": 25,
        "global_keyprefix": KEY_PREFIX,
        "socket_connect_timeout": 5,
    }
    if not url.startswith("unix://"):
        options["socket_keepalive"] = True
    return options
