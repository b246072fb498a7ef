"""The containers' commands without an engine: compose's environment alone, a mirror for a Hub."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from compose import ROOT, SERVICES, command, environment
from hub.state import Hub
from worker_tools import wait_for, write_llama

from worker.embedded import embedded_valkey

BIN = Path(sys.executable).parent
HOME = "http://127.0.0.1:{}"
KEY = {"Authorization": "Bearer a-key-of-the-test"}


@contextmanager
def container(
    service: str, values: Mapping[str, str], folder: Path, *, store: str
) -> Iterator[tuple[subprocess.Popen[bytes], Path, Mapping[str, str]]]:
    """Run a service's command in its own environment: no home, and a log for its stderr."""
    told = environment(service, values)
    for name in ("PISSA_DATA_DIR", "PISSA_LOCAL_ROOT", "HF_HOME"):
        told[name] = f"{folder}{told[name]}"
    told |= {"PISSA_REDIS_URL": store, "HOME": "/nonexistent", "TMPDIR": f"{folder}/tmp"}
    told |= {"PATH": f"{BIN}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    words = ["0" if word == "8000" else word for word in command(service)]
    log = folder / f"{service}.log"
    with log.open("wb") as written:
        process = subprocess.Popen(
            [BIN / words[0], *words[1:]], env=told, cwd=folder / "data", stderr=written
        )
    try:
        yield process, log, told
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def project_files() -> set[Path]:
    rooms = [ROOT / room for room in ("app", "worker", "pissa_core")]
    return {path for room in rooms for path in room.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.slow
def test_a_job_from_a_mirror_through_the_containers_commands(tmp_path: Path, hub: Hub) -> None:
    hub.create_repo("org/tiny", write_llama(tmp_path / "tiny", layers=1))
    for name in ("data", "models", "tmp"):
        (tmp_path / name).mkdir()
    values = {
        "PISSA_API_KEYS": "a-key-of-the-test",
        "PISSA_SECRET_KEY": "a-secret-of-the-test",
        "HF_ENDPOINT": hub.endpoint,
    }
    before = project_files()
    with (
        embedded_valkey(tmp_path / "store") as store,
        container("api", values, tmp_path, store=store) as (_, api_log, _),
        container("worker", values, tmp_path, store=store) as (worker, _, told),
    ):
        match = wait_for(
            lambda: re.search(r"service at http://0\.0\.0\.0:(\d+)", api_log.read_text()),
            "the API",
        )
        body = {"kind": "base-to-pissa", "model": "org/tiny", "pissa": {"rank": 4}}
        with httpx2.Client(base_url=HOME.format(match[1]), headers=KEY, timeout=60) as api:
            job = api.post("/v1/jobs", json=body).raise_for_status().json()
            path = f"/v1/jobs/{job['id']}"
            ended = ("succeeded", "failed")
            done = wait_for(
                lambda: (now := api.get(path).json())["status"] in ended and now, "the job's end"
            )
            assert done["status"] == "succeeded", done["error"]
            assert done["request"]["model"] == "org/tiny"
            assert api.get(f"{path}/files/config.json").status_code == 200
            healthy = [sys.executable, *SERVICES["worker"]["healthcheck"]["test"][2:]]
            health = subprocess.run(healthy, env=dict(told), capture_output=True, timeout=60)
            assert health.returncode == 0, health.stderr
            worker.terminate()
            assert worker.wait(60) == 0
            gone = subprocess.run(healthy, env=dict(told), capture_output=True, timeout=60)
            assert gone.returncode == 1
            assert b"no worker of" in gone.stderr
    assert project_files() == before, "the project's own folder is written to"
