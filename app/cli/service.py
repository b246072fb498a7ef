"""`pissa serve` and `pissa worker`: the service on this machine, from one command."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from app.cli.options import device_option
from app.cli.supervise import Workers
from pissa_core.errors import InvalidRequest

if TYPE_CHECKING:
    from worker.settings import Settings


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where jobs and kept files lie; default: PISSA_DATA_DIR, else ~/.local/share/pissa.",
)
@click.option("--workers", type=click.IntRange(0, 256), help="Default: one a GPU, at least one.")
def serve(*, host: str, port: int, data_dir: Path | None, workers: int | None) -> None:
    """Run the whole service here.

    API, page, workers and, unless PISSA_REDIS_URL is set, the store. One Ctrl-C ends all.
    """
    from app.door import refuse_open_door

    settings = read_settings(data_dir)
    refuse_open_door(host, has_keys=bool(settings.api_keys))
    commands = worker_commands(workers)
    with listening(host, port) as door, ExitStack() as stack:
        url = settings.redis_url or stack.enter_context(_embedded(settings))
        settings = settings.model_copy(update={"redis_url": url})
        environment = os.environ | settings.as_env()
        address = f"http://{_in_url(host)}:{door.getsockname()[1]}"
        stack.enter_context(Workers(commands, environment))
        _say(f"PiSSA service at {address}", f"data in {settings.data_dir}", "Ctrl-C ends it")
        run_api(settings, door)


@click.command()
@device_option
@click.option("--slots", type=click.IntRange(min=1), help="Matrices in flight at once.")
def worker(*, device: str, slots: int | None) -> None:
    """Run one more worker.

    It works for the service whose store is at PISSA_REDIS_URL.
    """
    from worker.main import run_worker

    settings = read_settings(None)
    connected = settings.model_copy(update={"redis_url": store_url(settings)})
    run_worker(connected, device=device, slots=slots)


def store_url(settings: Settings) -> str:
    """Return the store's address: PISSA_REDIS_URL, or the one `serve` runs on the data folder."""
    if settings.redis_url is not None:
        return settings.redis_url
    from worker.embedded import answers, socket_path

    url = f"unix://{socket_path(settings.data_dir)}"
    if not answers(url):
        raise InvalidRequest(
            f"PISSA_REDIS_URL is not set, and no `pissa serve` runs on {settings.data_dir}",
            hint="point PISSA_REDIS_URL at the service's store, or PISSA_DATA_DIR at its folder",
        )
    return url


def read_settings(data_dir: Path | None) -> Settings:
    """Read the service's settings; `data_dir` wins over PISSA_DATA_DIR."""
    from worker.settings import Settings

    if data_dir is not None:
        os.environ["PISSA_DATA_DIR"] = str(data_dir.expanduser().absolute())
    return Settings.from_env()


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Take the port before anything is started, so that a taken one costs nothing."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind((host, port))
            door.listen(128)
        except OSError as error:
            raise InvalidRequest(
                f"cannot listen on {host} port {port}: {error.strerror or error}",
                hint="choose another --port; 0 takes a free one",
            ) from error
        yield door


def worker_commands(number: int | None) -> list[list[str]]:
    """Return what starts each worker: one a GPU, or sharing the cores."""
    gpus = gpu_count()
    number = max(gpus, 1) if number is None else number
    if number > gpus > 0:
        raise InvalidRequest(
            f"{number} workers are more than the {gpus} GPUs here, and each takes one whole",
            hint="leave --workers out for one a GPU; CUDA_VISIBLE_DEVICES= serves from the CPU",
        )
    base = [sys.executable, "-P", "-m", "worker"]
    if gpus:
        return [[*base, "--device", f"cuda:{index}"] for index in range(number)]
    slots = max((os.cpu_count() or 1) // max(number, 1), 1)
    shared = ["--slots", str(slots)] if number > 1 else []
    return [[*base, *shared] for _ in range(number)]


def gpu_count() -> int:
    """Count the GPUs that torch would see, without the seconds that importing it takes."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    if visible is None or not present:
        return present
    return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])


def run_api(settings: Settings, door: socket.socket) -> None:
    """Serve the API on an open socket until a signal says to stop."""
    from app.asgi import make_app
    from app.server import serve_until_signalled

    # uvicorn takes the first signal and, when it is done, raises it again for us; a second one
    # must not cut the end of the workers short.
    try:
        serve_until_signalled(make_app(settings), door)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def _embedded(settings: Settings) -> Iterator[str]:
    from worker.embedded import embedded_valkey

    with embedded_valkey(settings.data_dir) as url:
        yield url


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)
