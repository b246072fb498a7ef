"""`uvicorn app.asgi:app` as a process: what it refuses to begin with, and what it logs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import httpx2
import pytest
from api_tools import BODY

UVICORN = (sys.executable, "-m", "uvicorn", "app.asgi:app", "--port", "0")


@contextmanager
def uvicorn(tmp_path, *options: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"PISSA_DATA_DIR": str(tmp_path / "data"), **env}
    environment.pop("PISSA_API_KEYS", None) if "PISSA_API_KEYS" not in env else None
    with subprocess.Popen(
        [*UVICORN, *options], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            finally:
                process.kill()


def address(process: subprocess.Popen[str]) -> str:
    told = (re.search(r"running on (http://[0-9.:]+)", line) for line in process.stderr)
    return next(match[1] for match in told if match)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
def test_an_open_door_without_keys_is_refused_before_it_opens(tmp_path, host):
    with uvicorn(tmp_path, "--host", host) as process:
        _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"[invalid_request] --host {host} lets other machines in" in told
    assert "hint: set PISSA_API_KEYS" in told
    assert "Traceback" not in told
    assert not (tmp_path / "data").exists()


def test_the_environment_of_uvicorn_opens_no_door_either(tmp_path):
    with uvicorn(tmp_path, UVICORN_HOST="0.0.0.0") as process:
        _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "--host 0.0.0.0 lets other machines in" in told


def test_processes_that_inherit_an_open_door_refuse_it(tmp_path):
    with uvicorn(tmp_path, "--host", "0.0.0.0", "--workers", "2") as process:
        told = next(line for line in process.stderr if "lets other machines in" in line)
        assert "PISSA_API_KEYS is not set" in told
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    assert "Application startup complete" not in rest
    assert not (tmp_path / "data").exists()


def test_with_keys_the_door_opens(tmp_path):
    with uvicorn(tmp_path, "--host", "0.0.0.0", PISSA_API_KEYS="a-key-of-the-test") as process:
        home = address(process).replace("0.0.0.0", "127.0.0.1")
        assert httpx2.get(f"{home}/v1/jobs").status_code == 401


def test_a_setting_that_is_wrong_is_named_without_a_trace(tmp_path):
    with uvicorn(tmp_path, PISSA_LEASE_S="long") as process:
        _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "[invalid_request] the environment variable PISSA_LEASE_S" in told
    assert "Traceback" not in told


def lines(text: str) -> Iterator[Mapping[str, object]]:
    for line in text.splitlines():
        yield json.loads(line)


def test_every_line_is_json_and_names_request_job_and_route(tmp_path):
    with uvicorn(tmp_path) as process:
        home = address(process)
        headers = {"X-Request-ID": "request-of-the-test"}
        job = httpx2.post(f"{home}/v1/jobs", json=BODY, headers=headers).json()
        httpx2.get(f"{home}/v1/jobs/{job['id']}")
        httpx2.get(f"{home}/livez")
        process.send_signal(signal.SIGTERM)
        told = list(lines(process.stderr.read()))
    (submitted,) = [line for line in told if line["event"] == "submitted"]
    assert submitted["job_id"] == job["id"]
    assert submitted["request_id"] == "request-of-the-test"
    assert (submitted["process"], submitted["level"]) == ("api", "info")
    answered = [line for line in told if line["event"] == "answered"]
    assert [(line["method"], line["route"], line["status"]) for line in answered] == [
        ("POST", "/v1/jobs", 202),
        ("GET", "/v1/jobs/{job_id}", 200),
    ]
    assert answered[0]["request_id"] == "request-of-the-test"
    assert answered[1]["request_id"] != "request-of-the-test"
