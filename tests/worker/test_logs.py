"""The log: JSON for machines, lines for people, and one request id from the API to the worker."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

from conftest import Service
from worker_tools import request, wait_for_end

from worker.terms import Status

SAY = (
    "import logging, structlog; from worker.logs import configure_logging\n"
    "configure_logging('test')\n"
    "with structlog.contextvars.bound_contextvars(request_id='r-1', job_id='job_1'):\n"
    "    logging.getLogger('x').warning('said', extra={'status': 202, 'secret': 's3'})\n"
    "try: raise ValueError('hf_' + 'Ab1' * 10)\n"
    "except ValueError: logging.getLogger('x').exception('failed')\n"
)


def test_what_is_no_terminal_gets_one_json_object_a_line() -> None:
    done = subprocess.run([sys.executable, "-c", SAY], capture_output=True, text=True, check=True)
    said, failed = map(json.loads, done.stderr.splitlines())
    assert said.pop("timestamp").endswith("Z")
    assert said == {
        "process": "test", "event": "said", "level": "warning", "logger": "x",
        "request_id": "r-1", "job_id": "job_1", "status": 202,
    }  # fmt: skip
    assert "ValueError: hf_***" in failed["exception"]
    assert "request_id" not in failed


def test_a_terminal_gets_lines_to_read() -> None:
    here, there = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", SAY], stderr=there) as process:
        os.close(there)
        text = b""
        try:
            while chunk := os.read(here, 65536):
                text += chunk
        except OSError:  # Linux says so when the other side of a terminal has closed it
            pass
        assert process.wait(60) == 0
    os.close(here)
    lines = text.decode().splitlines()
    assert "said" in lines[0]
    assert "request_id=r-1" in lines[0]
    assert not lines[0].startswith("{")
    assert "\x1b[" not in text.decode()
    assert "ValueError: hf_***" in lines[-1]


def test_the_request_that_submitted_a_job_is_named_where_the_job_is_worked_on(
    service: Service, tmp_path: Path
) -> None:
    body = request(service.root / "nowhere")
    job, _ = service.store.submit(body, owner="me", request_id="r-first")
    assert wait_for_end(service.store, job.id).status is Status.FAILED
    service.store.resume(job.id, hub_token=None, request_id="r-second")
    assert wait_for_end(service.store, job.id).status is Status.FAILED
    lines = [json.loads(line) for line in service.logged().splitlines() if job.id in line]
    named = [line["request_id"] for line in lines if line["event"].startswith("attempt")]
    assert named == ["r-first", "r-second"]
    assert all(line["job_id"] == job.id and line["task"] == "prepare" for line in lines)
    # Who looks after lost messages knows no request.
    planned = [line for line in lines if line["process"].startswith("planner")]
    assert all(line["request_id"] in named for line in planned)


THREADS = (
    "import logging; from concurrent.futures import ThreadPoolExecutor\n"
    "from worker.logs import about, configure_logging\n"
    "configure_logging('test')\n"
    "pool = ThreadPoolExecutor(1)\n"
    "say = lambda words: pool.submit(logging.getLogger('x').warning, words).result()\n"
    "with about(job_id='job_1', task='shard:0', request_id='r-1'): say('within')\n"
    "say('after')\n"
)


def test_threads_of_a_task_name_it_too() -> None:
    """Matrices, headers and the Hub have threads of their own, begun before the task or in it."""
    command = [sys.executable, "-c", THREADS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    within, after = map(json.loads, done.stderr.splitlines())
    told = {name: within[name] for name in ("job_id", "task", "request_id")}
    assert told == {"job_id": "job_1", "task": "shard:0", "request_id": "r-1"}
    assert not told.keys() & after.keys()
