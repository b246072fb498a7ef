"""Faults of the test Hub, on demand: what shall go wrong, where, and how often."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose method and path match.

    Attributes:
        path: a regular expression, searched in the path without query.
        skip: let so many of them pass first.
        status: answer with this status and these `headers`, `code` as X-Error-Code.
        stall_s: wait so long before answering.
        drop: close the connection without an answer.
        served: do what is asked before answering with `status`, or dropping the connection.
        run: called with the request's token, by name, once its body is here, before anything else.
        cut_after: close the connection after so many bytes of the body; of the request's with
            PUT, else of the answer's, and so with the two below.
        corrupt_at: flip the byte at this position of the body.
        drip: so many bytes of the body at a time, `drip_s` seconds apart.
        ignore_range: answer a ranged request with the whole file and status 200.
        body: answer with status 200 and this body, such as a proxy's page.
    """

    path: str
    method: str = "GET"
    times: int = 1
    skip: int = 0
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    code: str | None = None
    stall_s: float = 0.0
    drop: bool = False
    served: bool = False
    run: Callable[[str], object] | None = None
    cut_after: int | None = None
    corrupt_at: int | None = None
    drip: int | None = None
    drip_s: float = 0.01
    ignore_range: bool = False
    body: bytes | None = None


class Faults:
    """The faults that are still to come; the first that matches a request is used up by it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: list[Fault] = []

    def add(self, fault: Fault) -> Fault:
        with self._lock:
            self._pending.append(fault)
        return fault

    def take(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self._pending:
                if fault.times <= 0 or fault.method != method or not re.search(fault.path, path):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def clear(self) -> None:
        with self._lock:
            self._pending.clear()
