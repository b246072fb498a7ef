"""Running the console script `pissa` as users do: a process of its own, its streams apart."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

PISSA = str(Path(sys.executable).with_name("pissa"))
PATIENCE_S = 180


def environment(**extra: str) -> dict[str, str]:
    """Return this environment without anybody's own settings of the service or the Hub."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PISSA_", "HF_TOKEN", "HF_ENDPOINT"))
    }
    return {**kept, "HF_HUB_OFFLINE": "1", **extra}


def pissa(
    *arguments: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `pissa` to its end."""
    return subprocess.run(
        [PISSA, *map(str, arguments)],
        cwd=cwd,
        env=dict(env) if env is not None else environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def plant_strangers(folder: Path) -> None:
    """Leave modules in a folder that end whatever process imports them from there."""
    for name in ("torch", "tokenizers", "queue", "celery", "redis", "app", "worker"):
        (folder / f"{name}.py").write_text("raise SystemExit('a stranger has run')")
