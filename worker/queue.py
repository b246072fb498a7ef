"""Sends ids to workers: a thin Celery producer, the only thing the API knows of Celery."""

from __future__ import annotations

from worker.celery_app import KEY_PREFIX, make_app
from worker.terms import Task


class Queue:
    """Messages to workers, through the broker at the store's own address."""

    prefix = KEY_PREFIX

    def __init__(self, url: str) -> None:
        """Connect lazily."""
        self._app = make_app(url)

    def enqueue(self, task: Task, *args: str | int, queue: str, task_id: str) -> None:
        """Send one message; raises whatever the broker's client raises."""
        self._app.send_task(
            task.value, args=args, queue=queue, task_id=task_id, ignore_result=True, retry=False
        )

    def close(self) -> None:
        """Close every connection."""
        self._app.close()
