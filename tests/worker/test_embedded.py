"""The embedded Valkey: safe, durable, and gone with who started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import redis
from worker_tools import wait_for

from worker.celery_app import broker_url
from worker.embedded import answers, embedded_valkey, socket_path
from worker.errors import StoreUnavailable


def client_of(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, decode_responses=True)


def valkey_says(data_dir: Path) -> str:
    return (data_dir / "valkey" / "valkey.log").read_text()


def test_it_listens_on_a_socket_of_this_user_alone_and_forgets_nothing(tmp_path: Path) -> None:
    with embedded_valkey(tmp_path) as url:
        client = client_of(url)
        wanted = {
            "appendonly": "yes",
            "appendfsync": "always",
            "maxmemory-policy": "noeviction",
            "port": "0",
            "dir": str(tmp_path / "valkey"),
        }
        assert {name: client.config_get(name)[name] for name in wanted} == wanted
        assert socket_path(tmp_path).stat().st_mode & 0o777 == 0o700
        client.set("kept", "yes")
        client.close()
    assert not answers(url)
    with embedded_valkey(tmp_path) as url:
        client = client_of(url)
        assert client.get("kept") == "yes"
        client.close()


def test_what_was_answered_survives_a_kill(tmp_path: Path) -> None:
    with embedded_valkey(tmp_path) as url:
        client = client_of(url)
        pid = int(client.info("server")["process_id"])
        client.set("kept", "yes")
        os.kill(pid, signal.SIGKILL)
        client.close()
    with embedded_valkey(tmp_path) as url:
        client = client_of(url)
        assert client.get("kept") == "yes"
        client.close()


def test_a_server_that_dies_is_started_again_and_ends_with_the_block(tmp_path: Path) -> None:
    with embedded_valkey(tmp_path) as url:
        client = client_of(url)
        client.set("kept", "yes")
        first = psutil.Process(int(client.info("server")["process_id"]))
        first.kill()
        wait_for(lambda: not first.is_running(), "the end of the server", 10)
        wait_for(lambda: answers(url), "another server", 10)
        assert client.get("kept") == "yes"
        second = psutil.Process(int(client.info("server")["process_id"]))
        client.close()
        assert second != first
    assert not second.is_running()
    assert not answers(url)


def test_a_store_that_cannot_start_again_is_tried_until_it_can(tmp_path: Path) -> None:
    with embedded_valkey(tmp_path) as url:
        client = client_of(url)
        client.set("kept", "yes")
        log = tmp_path / "valkey" / "appendonlydir"
        log.rename(tmp_path / "away")
        log.write_text("not a folder")
        client.shutdown(nosave=True, force=True, now=True)
        wait_for(lambda: "appendonlydir" in valkey_says(tmp_path), "a vain attempt", 10)
        log.unlink()
        (tmp_path / "away").rename(log)
        wait_for(lambda: answers(url), "another server", 10)
        assert client.get("kept") == "yes"
        client.close()


def test_a_server_that_already_answers_is_used_and_left_alone(tmp_path: Path) -> None:
    with embedded_valkey(tmp_path) as first:
        with embedded_valkey(tmp_path) as second:
            assert second == first
        assert answers(first)


def test_a_path_too_long_for_a_socket_gets_a_short_one(tmp_path: Path) -> None:
    deep = tmp_path / ("a" * 60) / ("b" * 60)
    path = socket_path(deep)
    assert len(os.fsencode(path)) < 100
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert socket_path(tmp_path / "other" / ("c" * 100)) != path
    with embedded_valkey(deep) as url:
        assert answers(url)
    assert not path.exists()


def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from worker.embedded import embedded_valkey\n"
        "with embedded_valkey(Path(sys.argv[1])) as url: print(url, flush=True); time.sleep(60)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
    assert launcher.stdout is not None
    url = launcher.stdout.readline().decode().strip()
    client = client_of(url)
    server = psutil.Process(int(client.info("server")["process_id"]))
    client.close()
    launcher.kill()
    launcher.communicate()
    wait_for(lambda: not server.is_running() or server.status() == "zombie", "its end", 10)
    assert not answers(url)


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "valkey" / "appendonlydir"
    broken.parent.mkdir(parents=True)
    broken.write_text("not a folder")
    with (
        pytest.raises(StoreUnavailable, match=r"did not start: .*appendonlydir"),
        embedded_valkey(tmp_path),
    ):
        pass


def test_kombu_spells_a_socket_in_its_own_way() -> None:
    assert broker_url("unix:///run/x.sock") == "redis+socket:///run/x.sock"
    assert broker_url("unix:///run/x.sock?db=1") == "redis+socket:///run/x.sock?virtual_host=1"
    assert broker_url("redis://host:1/0") == "redis://host:1/0"
