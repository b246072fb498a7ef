"""The door stays shut: without API keys, the service does not begin to listen beyond this machine.

Each request is checked, too (`app.auth`); this tells the operator at once.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from contextlib import suppress
from pathlib import Path

import click

from app.auth import is_loopback
from pissa_core.errors import InvalidRequest
from worker.settings import Settings


def refuse_open_door(host: str, *, has_keys: bool) -> None:
    """Refuse to listen beyond this machine without API keys.

    Raises:
        InvalidRequest: naming the address.
    """
    if has_keys or is_loopback(host):
        return
    raise InvalidRequest(
        f"--host {host} lets other machines in, and PISSA_API_KEYS is not set",
        hint="set PISSA_API_KEYS to one or more secret keys, or leave --host at 127.0.0.1",
    )


def refuse_open_server(settings: Settings) -> None:
    """Refuse what the server around us, which is not ours to start, listens on.

    An app is not told where its server listens. The command `uvicorn` runs in a click context
    that knows; its processes of ``--workers`` and ``--reload`` inherit the socket itself.

    Raises:
        InvalidRequest: naming the address.
    """
    for host in (*_host_in_command(), *_hosts_inherited()):
        refuse_open_door(host, has_keys=bool(settings.api_keys))


def in_command_of_uvicorn() -> bool:
    """Whether the command `uvicorn` runs in this thread, and shows its user what is wrong."""
    context = click.get_current_context(silent=True)
    return context is not None and {"app", "host", "uds", "fd"} <= context.params.keys()


def _host_in_command() -> list[str]:
    if not in_command_of_uvicorn():
        return []
    params = click.get_current_context().params
    elsewhere = params["uds"] is not None or params["fd"] is not None
    return [] if elsewhere else [params["host"]]


def _hosts_inherited() -> list[str]:
    if multiprocessing.parent_process() is None:
        return []
    return [host for fd in Path("/dev/fd").iterdir() for host in _host_of_door(int(fd.name))]


def _host_of_door(fd: int) -> list[str]:
    """Return the address a TCP socket is bound to, if nobody is at its other end."""
    try:
        with socket.socket(fileno=os.dup(fd)) as door:
            if door.family not in (socket.AF_INET, socket.AF_INET6) or not door.getsockname()[1]:
                return []
            with suppress(OSError):
                door.getpeername()
                return []
            return [door.getsockname()[0]]
    except OSError:
        return []
