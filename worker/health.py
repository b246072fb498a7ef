"""``python -m worker.health``: exit 0 if a worker of this machine has been heard of lately."""

from __future__ import annotations

import socket
import sys

from pissa_core.errors import PissaError
from worker.connect import connect
from worker.settings import Settings


def main() -> None:
    """Ask the store at PISSA_REDIS_URL, which every worker tells that it lives."""
    try:
        healthy = is_healthy(Settings.from_env(), socket.gethostname())
    except PissaError as error:
        sys.exit(f"[{error.code}] {error.message}")
    if not healthy:
        sys.exit(f"no worker of {socket.gethostname()} has been heard of lately")


def is_healthy(settings: Settings, host: str) -> bool:
    """Whether a worker of `host` has told of itself within a lease.

    Raises:
        StoreUnavailable: if the store does not answer: nobody can know.
    """
    connection = connect(settings)
    try:
        heard = connection.call("workers")["workers"] or ()
    finally:
        connection.close()
    return any(
        entry["name"].endswith(f"@{host}") and entry["ago_ms"] <= 1000 * settings.lease_s
        for entry in heard
    )


if __name__ == "__main__":
    main()
