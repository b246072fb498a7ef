"""`pissa serve` and its clients, all as real processes: submit, watch, cancel, resume, fetch."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import torch
from cli_tools import PATIENCE_S, PISSA, environment, pissa, plant_strangers
from tinymodels import SHARDED, make_model, save_model
from transformers import LlamaConfig, LlamaForCausalLM

from app.cli.service import worker_commands
from pissa_core.errors import InvalidRequest


def wait_for(condition: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, f"waited in vain for {what}"
        time.sleep(0.05)


@dataclass
class Service:
    """A running `pissa serve`, and how its clients reach it."""

    url: str
    process: subprocess.Popen[str]
    root: Path
    log: Path

    def run(self, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a client command to its end."""
        return pissa(*arguments, env=environment(PISSA_URL=self.url, **env))

    def json(self, *arguments: str | Path) -> Any:
        """Run a client command that must succeed, and return what it prints."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def family(self) -> list[psutil.Process]:
        """Return every process below serve."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self) -> list[Any]:
        """Return the workers that the API knows."""
        found: list[Any] = httpx2.get(f"{self.url}/readyz", trust_env=False).json()["workers"]
        return found


@contextmanager
def served(folder: Path, *options: str, **env: str) -> Iterator[Service]:
    """Run `pissa serve` on a free port, among strangers; whatever happens, nothing of it stays."""
    root, log, strange = folder / "models", folder / "serve.log", folder / "strange"
    root.mkdir(exist_ok=True)
    strange.mkdir(exist_ok=True)
    plant_strangers(strange)
    with (
        log.open("wb") as written,
        subprocess.Popen(
            [PISSA, "serve", "--port", "0", "--data-dir", str(folder / "data"), *options],
            cwd=strange,
            env=environment(PISSA_LOCAL_ROOT=str(root), **env),
            stdout=subprocess.PIPE,
            stderr=written,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process,
    ):
        try:
            wait_for(lambda: _url_in(log) is not None or process.poll() is not None, "an address")
            url = _url_in(log)
            assert url is not None, log.read_text()
            service = Service(url, process, root, log)
            wait_for(lambda: _answers(url), "the API")
            yield service
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.wait()
    for left in psutil.wait_procs(family, timeout=20)[1]:
        left.kill()


def _url_in(log: Path) -> str | None:
    match = re.search(r"PiSSA service at (\S+)", log.read_text())
    return match[1] if match else None


def _answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/livez", trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for the tests that leave it as it was."""
    folder = tmp_path_factory.mktemp("service")
    with served(folder) as running:
        save_model("llama", running.root / "llama", max_shard_size=SHARDED)
        _save_slow_model(running.root / "slow")
        wait_for(lambda: bool(running.workers()), "a worker")
        yield running


def _save_slow_model(folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)


def test_submit_wait_fetch_and_load_with_stock_peft(service: Service, tmp_path: Path) -> None:
    done = service.run("submit", "./llama", "--rank", "4", "--wait")
    assert done.returncode == 0, done.stderr
    job_id, *table = done.stdout.splitlines()
    assert re.fullmatch(r"job_\w+", job_id)
    assert any(line.startswith("captured energy") for line in table)
    assert "Traceback" not in done.stderr

    out = tmp_path / "out"
    done = service.run("fetch", job_id, out)
    assert done.returncode == 0, done.stderr
    loaded: dict[str, Any] = {}
    snippet = done.stdout[done.stdout.index("from peft") :]
    exec(snippet, loaded)
    ids = torch.arange(1, 9).unsqueeze(0)
    with torch.no_grad():
        ours, original = loaded["model"](ids).logits, make_model("llama")(ids).logits
    torch.testing.assert_close(ours, original, rtol=1e-5, atol=1e-5 * float(original.abs().max()))


def test_submit_prints_the_job_and_watch_its_end(service: Service) -> None:
    job = service.json("submit", "./llama", "--rank", "2", "--svd-seed", "3")
    assert job["status"] in ("queued", "running")
    assert job["request"]["pissa"]["rank"] == 2
    assert job["request"]["pissa"]["svd"]["seed"] == 3
    ended = service.json("watch", job["id"])
    assert (ended["status"], ended["id"]) == ("succeeded", job["id"])
    assert ended["result"]["matrices"] == 14
    listed = service.json("jobs", "--status", "succeeded")["jobs"]
    assert job["id"] in [each["id"] for each in listed]
    table = service.run("jobs", "--limit", "1")
    assert len(table.stdout.splitlines()) == 2
    assert table.stdout.startswith("id ")


def test_an_output_below_the_local_root_appears_there(service: Service) -> None:
    job = service.json("submit", "./llama", "--rank", "3", "--out", "./made/here", "--wait")
    assert job["result"]["output"] == str(service.root / "made" / "here")
    assert (service.root / "made" / "here" / "pissa_manifest.json").is_file()


def test_a_job_that_fails_is_status_1_with_its_error(service: Service) -> None:
    done = service.run("submit", "./nowhere", "--wait")
    assert done.returncode == 1
    job_id = done.stdout.strip()
    error, hint = done.stderr.splitlines()[-2:]
    assert error.startswith("error[folder_not_found]: ")
    assert hint.startswith("hint: ")
    again = service.run("watch", job_id)
    assert (again.returncode, again.stdout) == (1, "")
    assert error in again.stderr
    done = service.run("fetch", job_id, service.log.parent / "never")
    assert done.returncode == 1
    assert "error[conflict]: " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "status"),
    [
        (["submit", "../outside"], "outside_local_root", 2),
        (["submit", "/etc"], "outside_local_root", 2),
        (["watch", "job_of_nobody"], "not_found", 1),
        (["cancel", "job_of_nobody"], "not_found", 1),
        (["resume", "job_of_nobody"], "not_found", 1),
        (["fetch", "job_of_nobody", "./never"], "not_found", 1),
        (["jobs", "--status", "dancing"], "invalid_request", 2),
    ],
)
def test_what_the_service_refuses_is_shown_with_its_code(
    service: Service, arguments: list[str], code: str, status: int
) -> None:
    done = service.run(*arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert f"\nerror[{code}]: " in f"\n{done.stderr}"


def test_cancel_and_resume(service: Service) -> None:
    job_id = service.run("submit", "./slow", "--svd-method", "exact").stdout.strip()
    wait_for(lambda: _matrices_done(service, job_id) >= 1, "a matrix")
    done = service.run("cancel", job_id)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"{job_id}  (cancelling|cancelled)\n", done.stdout)
    watched = service.run("watch", job_id)
    assert (watched.returncode, watched.stdout) == (1, "")
    assert watched.stderr.splitlines()[-2:] == [
        f"error[cancelled]: job {job_id} was cancelled",
        f"hint: `pissa resume {job_id}` goes on from what is sealed",
    ]
    assert service.json("resume", job_id)["status"] in ("queued", "running")
    assert service.json("watch", job_id)["status"] == "succeeded"
    done = service.run("cancel", job_id)
    assert done.returncode == 1
    assert done.stderr.startswith("error[conflict]: ")


def _matrices_done(service: Service, job_id: str) -> int:
    answer = httpx2.get(f"{service.url}/v1/jobs/{job_id}", trust_env=False).json()
    done: int = answer["progress"]["matrices"]["done"]
    return done


def test_an_interrupted_wait_leaves_the_job_running(service: Service) -> None:
    with subprocess.Popen(
        [PISSA, "submit", "./slow", "--svd-method", "exact", "--svd-seed", "5", "--wait"],
        env=environment(PISSA_URL=service.url),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        job_id = process.stdout.readline().strip()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert stderr.endswith(
        f"interrupted: the job goes on; `pissa watch {job_id}` follows it again\n"
    )
    assert service.json("watch", job_id)["status"] == "succeeded"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_everything(tmp_path: Path, number: signal.Signals) -> None:
    with served(tmp_path) as service:
        wait_for(lambda: bool(service.workers()), "a worker")
        family = service.family()
        assert len(family) >= 2  # a worker and the store, at the least
        # An open stream must not hold up the end.
        with httpx2.stream("GET", f"{service.url}/metrics", trust_env=False):
            service.process.send_signal(number)
            stdout, _ = service.process.communicate(timeout=PATIENCE_S)
        assert (service.process.returncode, stdout) == (0, "")
        assert psutil.wait_procs(family, timeout=5)[1] == []
        assert "Traceback" not in service.log.read_text()


@pytest.mark.slow
def test_kill_9_takes_the_children_along_and_jobs_survive_it(tmp_path: Path) -> None:
    with served(tmp_path) as service:
        save_model("llama", service.root / "llama")
        job_id = service.run("submit", "./llama", "--rank", "4").stdout.strip()
        family = service.family()
        service.process.kill()
        service.process.wait()
        assert psutil.wait_procs(family, timeout=PATIENCE_S)[1] == []
    with served(tmp_path) as service:
        assert service.json("watch", job_id)["status"] == "succeeded"


def test_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    with served(tmp_path) as service:
        wait_for(lambda: bool(service.workers()), "a worker")
        (worker,) = [each for each in _children(service) if "worker" in each.cmdline()]
        worker.kill()
        wait_for(lambda: "a worker ended with status -9" in service.log.read_text(), "the news")
        wait_for(lambda: any(w.pid != worker.pid and "worker" in w.cmdline()
                             for w in _children(service)), "another worker")  # fmt: skip


def _children(service: Service) -> list[psutil.Process]:
    return psutil.Process(service.process.pid).children()


def test_with_keys_only_who_has_one_is_served(tmp_path: Path) -> None:
    with served(tmp_path, "--workers", "0", PISSA_API_KEYS="one,two") as service:
        done = service.run("jobs")
        assert done.returncode == 1
        assert done.stderr.startswith("error[unauthorized]: ")
        assert service.run("jobs", PISSA_API_KEY="two").returncode == 0
        assert "one" not in service.log.read_text().split()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_an_open_door_without_keys_is_refused(tmp_path: Path, host: str) -> None:
    done = pissa("serve", "--host", host, "--port", "0", "--data-dir", tmp_path / "data")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error[invalid_request]: --host {host} lets other machines in")
    assert "\nhint: set PISSA_API_KEYS" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = pissa("serve", "--port", port, "--data-dir", tmp_path / "data")
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_bad_setting_is_refused_by_name(tmp_path: Path) -> None:
    done = pissa("serve", env=environment(PISSA_REDIS_URL="http://x", PISSA_DATA_DIR=str(tmp_path)))
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error[invalid_request]: the environment variable PISSA_REDIS_URL"
    )


@pytest.mark.slow
def test_one_more_worker_joins_and_outlives_the_shell_that_started_it(tmp_path: Path) -> None:
    with served(tmp_path, "--workers", "0") as service:
        env = environment(PISSA_DATA_DIR=str(tmp_path / "data"), PISSA_LOCAL_ROOT=str(service.root))
        shell = f"{PISSA} worker --device cpu --slots 1 >{tmp_path / 'worker.log'} 2>&1 & echo $!"
        printed = subprocess.run(
            ["sh", "-c", shell], env=env, stdout=subprocess.PIPE, text=True, check=True
        )
        worker = psutil.Process(int(printed.stdout))
        try:
            wait_for(lambda: bool(service.workers()), "the worker")
            save_model("llama", service.root / "llama")
            assert (
                service.json("submit", "./llama", "--rank", "4", "--wait")["status"] == "succeeded"
            )
            worker.terminate()
            wait_for(lambda: service.workers() == [], "its leaving")
            assert psutil.wait_procs([worker], timeout=PATIENCE_S)[1] == []
        finally:
            if worker.is_running():
                worker.kill()


def test_a_worker_without_a_store_is_refused(tmp_path: Path) -> None:
    done = pissa("worker", env=environment(PISSA_DATA_DIR=str(tmp_path)))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error[invalid_request]: PISSA_REDIS_URL is not set")


def test_a_worker_takes_a_gpu_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.cli.service.gpu_count", lambda: 2)
    assert [command[-1] for command in worker_commands(None)] == ["cuda:0", "cuda:1"]
    assert [command[-1] for command in worker_commands(1)] == ["cuda:0"]
    with pytest.raises(InvalidRequest, match="3 workers are more than the 2 GPUs here"):
        worker_commands(3)
