"""`make demo HUB=1`: the demo from Hub to Hub, on a Hub of our own that the tests use too.

A real model is served as a repo, and the demo publishes its result there: staged on a branch, made
visible by one commit. Everything goes through the official client, over HTTP, on loopback.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import httpx2

from app.demo import console, interrupt, is_folder, stop, suggest
from app.minilm import fetch_minilm

_TEST_HUB = Path(__file__).resolve().parent.parent / "tests" / "hub"
_FOLDER = Path(".demo-hub")
_OWNER = "demo"


@click.command()
@click.argument("model", required=False)
@click.option("--rank", default=16, show_default=True, help="rank of the adapter")
def main(model: str | None, rank: int) -> None:
    """Serve MODEL (a folder) on a Hub of our own, convert it from there to there, and compare."""
    signal.signal(signal.SIGTERM, interrupt)
    if model and not is_folder(model):
        raise click.ClickException(f"{model} is no folder, and this Hub has nothing else to serve")
    folder = Path(model).expanduser().resolve() if model else fetch_minilm().resolve()
    source, output = f"{_OWNER}/{folder.name}", f"{_OWNER}/{folder.name}-pissa-r{rank}"
    token = f"hf_{secrets.token_hex(16)}"
    with own_hub(folder, source, token) as endpoint:
        console.print(f"Hub: {endpoint} serves {folder} as {source}")
        command = ["app.demo", source, "--rank", str(rank), "--output", f"hf://{output}"]
        with running(
            [sys.executable, "-P", "-m", *command], env=client_environment(endpoint, token)
        ) as demo:
            status = demo.wait()
        if status == 0:
            report_traffic(endpoint, output)
    if status == 0:
        suggest(str(folder))
    raise SystemExit(status)


def report_traffic(endpoint: str, output: str) -> None:
    """Tell what the Hub saw: bytes each way, and the commits by branch."""
    counts = httpx2.get(f"{endpoint}/_counts").raise_for_status().json()
    commits = Counter(branch for repo, branch in counts["commits"] if repo == output)
    sent, received = (sum(counts[way].values()) / 1e6 for way in ("sent", "received"))
    console.print(f"Down from and up to the Hub         {sent:.1f} MB, {received:.1f} MB")
    console.print("  with the original and the result, loaded from it for the comparison")
    for branch, number in commits.items():
        console.print(f"Commits on {branch}: {number}")
    console.print(f"This Hub ends here; what it kept is in {_FOLDER / 'storage'}")


@contextlib.contextmanager
def own_hub(folder: Path, repo_id: str, token: str) -> Iterator[str]:
    """Serve `folder` as a repo, and whatever is written with the token; yield the address."""
    shutil.rmtree(_FOLDER, ignore_errors=True)
    served = _FOLDER / "repos" / repo_id
    served.parent.mkdir(parents=True)
    served.symlink_to(folder)
    options = ["--root", str(_FOLDER / "repos"), "--storage", str(_FOLDER / "storage")]
    command = [sys.executable, str(_TEST_HUB), *options, "--token", f"{_OWNER}={token}"]
    with running(command, stdout=subprocess.PIPE, text=True) as hub:
        assert hub.stdout is not None
        with hub.stdout:
            endpoint = hub.stdout.readline().strip()
        if not endpoint:
            raise click.ClickException(f"the Hub ended with {hub.wait()}")
        yield endpoint


def client_environment(endpoint: str, token: str) -> dict[str, str]:
    """Return the environment in which the official client knows this Hub only."""
    return os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": token,
        "HF_HOME": str((_FOLDER / "cache").resolve()),
        "HF_HUB_DISABLE_XET": "1",
    }


@contextlib.contextmanager
def running(command: list[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Run a program until the block is left.

    Ctrl-C does not reach it: we end it, after what depends on it, and only once.
    """
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield process
    finally:
        stop(process)


if __name__ == "__main__":
    main()
