"""Worker processes are kept alive together and ended together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from app.cli import supervise
from app.cli.supervise import Workers

PATIENCE_S = 60
WRITES_ITS_PID = "import os, sys, time; print(os.getpid(), file=open(sys.argv[1], 'a')); "
SLEEPS = WRITES_ITS_PID + "time.sleep(600)"
STUBBORN = (
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + WRITES_ITS_PID
) + "time.sleep(600)"


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def pids(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def command(code: str, file: Path) -> list[str]:
    return [sys.executable, "-c", code, str(file)]


def test_all_start_and_all_end(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    with Workers([command(SLEEPS, file) for file in files], os.environ):
        wait_for(lambda: all(pids(file) for file in files))
        assert all(psutil.pid_exists(pids(file)[0]) for file in files)
    assert not any(psutil.pid_exists(pids(file)[0]) for file in files)


def test_they_are_no_part_of_our_process_group(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    with Workers([command(SLEEPS, file)], os.environ):
        wait_for(lambda: bool(pids(file)))
        assert os.getpgid(pids(file)[0]) != os.getpgid(0)


def test_one_that_dies_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervise, "FIRST_DELAY_S", 0.01)
    file = tmp_path / "pid"
    with Workers([command(SLEEPS, file)], os.environ):
        wait_for(lambda: len(pids(file)) == 1)
        os.kill(pids(file)[0], signal.SIGKILL)
        wait_for(lambda: len(pids(file)) == 2)
    assert "a worker ended with status -9; it is started again" in capfd.readouterr().err


def test_one_that_dies_at_once_is_started_again_ever_more_slowly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "POLL_S", 0.01)
    file = tmp_path / "pid"
    with Workers([command(WRITES_ITS_PID, file)], os.environ) as workers:
        wait_for(lambda: len(pids(file)) >= 2)
        (place,) = workers._places
        assert place.delay_s > supervise.FIRST_DELAY_S


def test_one_that_ignores_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "STOP_S", 0.2)
    file = tmp_path / "pid"
    with Workers([command(STUBBORN, file)], os.environ):
        wait_for(lambda: bool(pids(file)))
    assert not psutil.pid_exists(pids(file)[0])


def test_they_end_with_us_however_we_end(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    code = (
        "import os, sys, time\n"
        "from app.cli.supervise import Workers\n"
        f"with Workers([{command(SLEEPS, file)!r}], os.environ):\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        wait_for(lambda: bool(pids(file)))
        parent.kill()
    wait_for(lambda: not psutil.pid_exists(pids(file)[0]))
