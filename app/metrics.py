"""What the store knows, as Prometheus metrics; computed when asked, so every API tells the same."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from worker.contract import Status
from worker.store import JobStore

_PAGE = 200


class StoreCollector(Collector):
    """Reads a job store once a scrape."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the metrics.

        Raises:
            StoreUnavailable: if the store is away; a scrape without numbers would look like idling.
        """
        counts = self._store.counts()
        jobs = GaugeMetricFamily("pissa_jobs", "Jobs in each state.", labels=["status"])
        for status, count in counts.items():
            jobs.add_metric([status.value], count)
        yield jobs
        yield GaugeMetricFamily(
            "pissa_queue_age_seconds",
            "How long the job that waits longest has been queued; 0 if none waits.",
            value=self._queue_age_s() if counts[Status.QUEUED] else 0.0,
        )
        yield from self._workers()

    def _workers(self) -> Iterator[GaugeMetricFamily]:
        workers = self._store.workers()
        seen = GaugeMetricFamily(
            "pissa_workers", "Workers heard of lately.", labels=["device", "busy"]
        )
        for device in sorted({worker.device for worker in workers}):
            for busy in (True, False):
                number = sum(w.device == device and w.busy == busy for w in workers)
                seen.add_metric([device, str(busy).lower()], number)
        yield seen
        heard = GaugeMetricFamily(
            "pissa_worker_seen_seconds", "Time since a worker's heartbeat.", labels=["worker"]
        )
        for worker in workers:
            heard.add_metric([worker.name], worker.seen_s)
        yield heard

    def _queue_age_s(self) -> float:
        cursor, oldest = None, datetime.now(UTC)
        while True:
            jobs, cursor = self._store.list(
                owner=None, statuses=[Status.QUEUED], limit=_PAGE, after=cursor
            )
            if jobs:
                oldest = jobs[-1].created_at
            if cursor is None:
                return max((datetime.now(UTC) - oldest).total_seconds(), 0.0)
