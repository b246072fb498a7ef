"""The ledger of the disk: never more than the budget, whoever dies at whatever moment."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pissa_core.adapters.ledger import Ledger
from pissa_core.adapters.local.scratch import adopt, open_scratch
from pissa_core.errors import DiskTooSmall

HOLDER = """
import sys, time
from pathlib import Path
from pissa_core.adapters.ledger import Ledger
from pissa_core.adapters.local.scratch import open_scratch

folder, work, nbytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
work.mkdir(parents=True, exist_ok=True)
scratch, lock = open_scratch(work)
(scratch / "journal").write_text("{}")
with Ledger(folder, 100).try_hold(nbytes, scratch, waited_s=0):
    print(scratch, flush=True)
    time.sleep(600)
"""


@contextmanager
def another_holder(folder: Path, work: Path, nbytes: int) -> Iterator[tuple[int, Path]]:
    """Let another process hold bytes; yield its id and its scratch."""
    command = [sys.executable, "-c", HOLDER, str(folder), str(work), str(nbytes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        scratch = Path(process.stdout.readline().strip())
        try:
            yield process.pid, scratch
        finally:
            process.kill()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def hold(ledger: Ledger, nbytes: int, scratch: Path | None = None, waited_s: float = 0):
    return ledger.try_hold(nbytes, scratch, waited_s=waited_s)


def test_what_is_held_never_exceeds_the_budget(tmp_path):
    held, most, lock = 0, 0, threading.Lock()

    def work(seed: int) -> None:
        nonlocal held, most
        ledger, rng = Ledger(tmp_path / "ledger", 100), random.Random(seed)
        for _ in range(10):
            nbytes = rng.randint(1, 100)
            while (reservation := hold(ledger, nbytes)) is None:
                time.sleep(0.001)
            with reservation:
                with lock:
                    held += nbytes
                    most = max(most, held)
                time.sleep(0.001)
                with lock:
                    held -= nbytes

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 50 < most <= 100
    assert not list((tmp_path / "ledger").iterdir())


def test_another_process_counts_until_it_is_killed(tmp_path):
    ledger = Ledger(tmp_path / "ledger", 100)
    with another_holder(tmp_path / "ledger", tmp_path / "work", 60) as (pid, scratch):
        assert hold(ledger, 41) is None
        with hold(ledger, 40):
            assert hold(ledger, 1) is None
        kill(pid)
        shutil.rmtree(scratch)
        with hold(ledger, 100):
            assert hold(ledger, 1) is None
    with hold(ledger, 100):
        pass


def leave_behind(folder: Path, work: Path, nbytes: int) -> Path:
    """Hold bytes and die: all that the kernel does then is to close what was locked."""
    work.mkdir()
    scratch, lock = open_scratch(work)
    (scratch / "journal").write_text("{}")
    reservation = hold(Ledger(folder, 100), nbytes, scratch)
    os.close(reservation.lock)
    os.close(lock)
    return scratch


def test_scratch_of_the_dead_counts_until_it_is_adopted(tmp_path):
    ledger = Ledger(tmp_path / "ledger", 100)
    scratch = leave_behind(tmp_path / "ledger", tmp_path / "work", 60)
    assert hold(ledger, 41) is None
    folder, lock = adopt(tmp_path / "work")
    assert folder == scratch
    with hold(ledger, 60, scratch):
        assert hold(ledger, 41) is None
        shutil.rmtree(scratch)
    with hold(ledger, 100):
        pass
    os.close(lock)


def test_scratch_of_the_dead_is_taken_over_even_where_there_is_no_room(tmp_path):
    leave_behind(tmp_path / "ledger", tmp_path / "work", 60)
    smaller = Ledger(tmp_path / "ledger", 65)
    adopted, lock = adopt(tmp_path / "work")
    with hold(smaller, 5):
        with hold(smaller, 61, adopted):
            assert hold(smaller, 1) is None
        assert hold(smaller, 1) is None  # the scratch is still there, and nobody's
    os.close(lock)


def test_scratch_of_the_dead_makes_room_when_nobody_adopts_it_in_time(tmp_path):
    ledger = Ledger(tmp_path / "ledger", 100)
    scratch = leave_behind(tmp_path / "ledger", tmp_path / "work", 60)
    assert hold(ledger, 50, waited_s=1) is None
    assert hold(ledger, 50, waited_s=3600) is None
    assert not scratch.exists()
    with hold(ledger, 50, waited_s=3600):
        pass


def test_scratch_of_the_living_makes_no_room(tmp_path):
    ledger = Ledger(tmp_path / "ledger", 100)
    (tmp_path / "work").mkdir()
    scratch, lock = open_scratch(tmp_path / "work")
    with hold(ledger, 60, scratch):
        assert hold(ledger, 50, waited_s=3600) is None
        assert scratch.exists()
    os.close(lock)


def test_a_sweep_forgets_what_is_gone(tmp_path):
    ledger = Ledger(tmp_path / "ledger", 100)
    ledger.sweep()
    scratch = leave_behind(tmp_path / "ledger", tmp_path / "work", 60)
    ledger.sweep()
    assert hold(ledger, 41) is None
    shutil.rmtree(scratch)
    ledger.sweep()
    assert not list((tmp_path / "ledger").iterdir())


def test_what_can_never_fit_is_refused_with_the_numbers(tmp_path):
    with pytest.raises(DiskTooSmall, match=r"needs 1,001 bytes .* disk budget is 1,000"):
        hold(Ledger(tmp_path / "ledger", 1000), 1001)


def test_scratch_left_by_an_attempt_that_failed_goes_on_counting(tmp_path):
    ledger = Ledger(tmp_path / "ledger", 100)
    (tmp_path / "work").mkdir()
    scratch, lock = open_scratch(tmp_path / "work")
    with hold(ledger, 60, scratch):
        (scratch / "journal").write_text("{}")
    os.close(lock)
    assert hold(ledger, 50) is None
    shutil.rmtree(scratch)
    with hold(ledger, 100):
        pass


def test_without_a_budget_it_is_what_is_free_and_what_work_holds(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    ledger = Ledger(tmp_path / "not" / "there")
    assert 0.9 * free < ledger.capacity() < free
    assert not (tmp_path / "not").exists()
    with pytest.raises(DiskTooSmall):
        hold(ledger, 2 * free)
    (tmp_path / "work").mkdir()
    scratch, lock = open_scratch(tmp_path / "work")
    with hold(ledger, 1000, scratch):
        assert ledger.capacity() > 0
    os.close(lock)
