"""What this process has answered, for Prometheus: requests and how long they took, by route."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.routing import Mount
from starlette.types import Scope

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Traffic:
    """Counts of one API process; they begin anew with it, as Prometheus expects of a process."""

    def __init__(self) -> None:
        """Begin at nothing."""
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "pissa_http_requests",
            "Requests answered by this process.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "pissa_http_request_seconds",
            "Time until an answer began; a stream of events goes on after that.",
            ["method", "route"],
            buckets=_SECONDS,
            registry=self.registry,
        )

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one answer. `route` is a template: no path of a stranger's becomes a label."""
        known = method if method in _METHODS else "other"
        self._requests.labels(known, route, str(status)).inc()
        self._seconds.labels(known, route).observe(seconds)


def route_of(scope: Scope) -> str:
    """Return the template that a routed request matched, ``/v1/jobs/{job_id}``."""
    route = scope.get("route")
    if route is None:
        return _mount_of(scope) or "none"
    return str(getattr(route, "path", "none"))


def _mount_of(scope: Scope) -> str | None:
    # A mount replaces the root path by its own; what it serves below is its own affair.
    app, root = scope.get("app"), str(scope.get("root_path", ""))
    mounts = getattr(getattr(app, "router", None), "routes", ())
    return next((m.path for m in mounts if isinstance(m, Mount) and root.endswith(m.path)), None)
