"""What the store knows, as Prometheus metrics; read when asked, so every API tells the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from worker.store import JobStore
from worker.store.figures import Figures

Metric = CounterMetricFamily | GaugeMetricFamily

_COUNTERS: tuple[tuple[str, str, str, str, float], ...] = (
    # metric, what it says, its label, the store's group, and one of the store's units in ours
    ("pissa_jobs_submitted", "Jobs accepted; `plan` are plans asked for.", "kind", "submitted", 1),
    ("pissa_jobs_ended", "Jobs that came to an end, again where resumed.", "status", "ended", 1),
    ("pissa_failures", "Jobs that failed, by the code of their error.", "code", "failed", 1),
    ("pissa_plan_failures", "Plans refused, by the code of the error.", "code", "plan_failed", 1),
    ("pissa_retries", "Tasks put off to be tried again.", "code", "retried", 1),
    ("pissa_tasks_lost", "Tasks taken back from workers that died.", "code", "lost", 1),
    ("pissa_matrices", "Matrices finished here, or found finished.", "how", "matrices", 1),
    ("pissa_shards", "Shards sealed here, or found sealed.", "how", "shards", 1),
    ("pissa_bytes", "Bytes of shards worked through, or found done.", "how", "bytes", 1),
    ("pissa_phase_seconds", "Time that jobs have spent in each phase.", "phase", "ms", 1e-3),
)


class StoreCollector(Collector):
    """Reads a job store once a scrape; what it costs does not grow with the number of jobs."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics.

        Raises:
            StoreUnavailable: if the store is away; a scrape without numbers would look like idling.
        """
        figures = self._store.figures()
        yield from _now(figures)
        yield from _totals(figures)
        yield from self._workers(figures)

    def _workers(self, figures: Figures) -> Iterator[Metric]:
        workers = self._store.workers()
        seen = GaugeMetricFamily(
            "pissa_workers", "Workers heard of lately.", labels=["device", "busy"]
        )
        for device in sorted({worker.device for worker in workers}):
            for busy in (True, False):
                number = sum(w.device == device and w.busy == busy for w in workers)
                seen.add_metric([device, str(busy).lower()], number)
        yield seen
        heard = {worker.name: worker.seen_s for worker in workers}
        yield _gauge("pissa_worker_seen_seconds", "Time since a heartbeat.", "worker", heard)
        peaks = {worker.name: figures.peaks.get(worker.name, 0) for worker in workers}
        yield _gauge(
            "pissa_worker_peak_memory_bytes",
            "The most memory that a task of this worker has held.",
            "worker",
            peaks,
        )


def _now(figures: Figures) -> Iterator[Metric]:
    jobs = {status.value: count for status, count in figures.jobs.items()}
    yield _gauge("pissa_jobs", "Jobs in each state.", "status", jobs)
    yield GaugeMetricFamily(
        "pissa_queue_age_seconds",
        "How long the job that waits longest has been queued; 0 if none waits.",
        value=figures.queue_age_s,
    )
    yield _gauge(
        "pissa_tasks",
        "Tasks sent to workers, held by them, or delayed for a retry.",
        "state",
        figures.tasks,
    )


def _totals(figures: Figures) -> Iterator[Metric]:
    for name, words, label, group, unit in _COUNTERS:
        counter = CounterMetricFamily(name, words, labels=[label])
        for value, count in sorted(figures.totals.get(group, {}).items()):
            counter.add_metric([value], count * unit)
        yield counter


def _gauge(name: str, words: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(name, words, labels=[label])
    for value, number in values.items():
        gauge.add_metric([value], number)
    return gauge
