"""Structured logs on stderr, with request, job and task, without Hub tokens.

One JSON object a line; on a terminal, lines to read.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import structlog

FIELDS = ("job_id", "task", "request_id", "owner", "method", "route", "status", "ms")
"""What a line may say beside its sentence, given as `extra`."""

_at_hand: dict[str, str] = {}
"""What this process works on: one task at a time, in whatever threads."""

_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")


def redact(value: Any) -> Any:
    """Return `value` with everything shaped like a Hub token made unreadable."""
    if isinstance(value, str):
        return _TOKEN.sub("hf_***", value)
    if isinstance(value, dict):
        return {redact(key): redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return value


@contextmanager
def about(**names: str) -> Iterator[None]:
    """Name, in every line of this process and all its threads, the task it works on."""
    _at_hand.update(names)
    try:
        yield
    finally:
        _at_hand.clear()


def _name_task(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {**_at_hand, **event}


def configure_logging(process: str, level: int = logging.INFO) -> None:
    """Send every logger of this process to stderr, in lines that name `process`."""

    def name_process(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        return {"process": process, **event}

    def remove_tokens(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        return {key: redact(item) for key, item in event.items()}

    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.ExtraAdder(allow=FIELDS),
            _name_task,
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            name_process,
            remove_tokens,
            _lines() if sys.stderr.isatty() else structlog.processors.JSONRenderer(default=str),
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        # uvicorn's own handlers would say everything twice, and its lines of access know no route.
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"
    for noisy in ("celery.worker.strategy", "celery.app.trace", "kombu", "httpx2", "httpcore2"):
        logging.getLogger(noisy).setLevel(max(level, logging.WARNING))


def _lines() -> Callable[..., str]:
    """Return what renders an event as a line to read: when, how grave, what, and about what."""
    plain = structlog.dev.plain_traceback
    return structlog.dev.ConsoleRenderer(colors=False, pad_event_to=0, exception_formatter=plain)
