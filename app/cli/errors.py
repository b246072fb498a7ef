"""How a command ends: its exit status, and what it says on stderr when it fails."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path

import click

from pissa_core.errors import AccessError, InvalidRequest, PissaError
from pissa_core.refs import HubRef, Ref

REFUSED_CODES = frozenset(
    {"invalid_request", "invalid_config", "invalid_reference", "outside_local_root"}
)
"""What the request alone shows, whether this process or the service says so."""


class ExitStatus(IntEnum):
    """The exit statuses of every command."""

    DONE = 0
    FAILED = 1
    REFUSED = 2
    INTERRUPTED = 130


class ServiceUnreachable(PissaError):
    """Nothing answers at PISSA_URL, or what answers is not this service."""

    code = "service_unreachable"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, with a sentence on what became of the work."""


@contextmanager
def on_interrupt(message: str) -> Iterator[None]:
    """Say `message` if the block is interrupted."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt as error:
        raise Interrupted(message) from error


def report(error: BaseException, *, debug: bool) -> ExitStatus:
    """Write `error` to stderr as a sentence with its code, and return the exit status it means."""
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, KeyboardInterrupt | click.Abort):
        sys.stderr.write(f"{error if isinstance(error, Interrupted) else 'interrupted'}\n")
        return ExitStatus.INTERRUPTED
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        sys.stderr.write(f"{error.format_message()}\n")
        return ExitStatus.REFUSED
    known = _as_pissa_error(error)
    sys.stderr.write(f"error[{known.code}]: {known.message}\n")
    if known.hint:
        sys.stderr.write(f"hint: {known.hint}\n")
    return ExitStatus.REFUSED if known.code in REFUSED_CODES else ExitStatus.FAILED


def _as_pissa_error(error: BaseException) -> PissaError:
    if isinstance(error, PissaError):
        return error
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "pissa"
        return InvalidRequest(
            error.format_message().rstrip("."), hint=f"{command} --help lists what is accepted"
        )
    if isinstance(error, click.ClickException):
        return InvalidRequest(error.format_message())
    return PissaError(
        f"{type(error).__name__}: {error}",
        hint="this is a fault of the program; run it again with --debug and report what it shows",
    )


@contextmanager
def folder_hint(*refs: Ref | None) -> Iterator[None]:
    """Tell someone who wrote ``model`` and meant the folder how folders are written."""
    try:
        yield
    except AccessError as error:
        names = [ref.repo_id for ref in refs if isinstance(ref, HubRef)]
        name = next((name for name in names if Path(name).is_dir()), None)
        if name is not None:
            error.hint = f"there is a folder {name} here; write ./{name} to mean it"
        raise
