"""The command `pissa`: what each word does, and how a command ends.

stdout carries the result, a table or one JSON object; stderr carries progress and errors.
Nothing here imports torch unless the command does arithmetic, and of the commands only the one
that was asked for is imported.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any, NoReturn, cast

import click

from app.cli.errors import ExitStatus, report

DEBUG = "--debug"
_MODULES = {
    "client": ("cancel", "delete", "jobs", "resume", "watch"),
    "fetch": ("fetch",),
    "local": ("convert", "plan", "to-base", "verify"),
    "service": ("serve", "worker"),
    "submission": ("submit",),
    "to_lora": ("to-lora",),
}
_PLANNED = _MODULES["local"]
_SERVING = f"{__name__}.service"
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


class Commands(Mapping[str, click.Command]):
    """The commands by name, each imported when it is asked for."""

    def get(self, name: str, default: Any = None) -> Any:
        """Return one; what goes wrong while it is imported is not taken for its absence."""
        return self[name] if name in _HOMES else default

    def __getitem__(self, name: str) -> click.Command:
        module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
        command: click.Command = getattr(module, name.replace("-", "_"))
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(_HOMES)

    def __len__(self) -> int:
        return len(_HOMES)


@click.group(
    commands=cast(dict[str, click.Command], Commands()),  # click only reads it
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="pissa-service", prog_name="pissa")
@click.option(DEBUG, is_flag=True, help="Show tracebacks. May stand anywhere in the command.")
def pissa(debug: bool) -> None:
    """Turn a Hugging Face checkpoint into its PiSSA form, here or by a service.

    plan, convert, to-lora, to-base and verify work in this process. serve and worker run the
    service; submit, jobs, watch, cancel, resume, fetch and delete talk to one at PISSA_URL (default
    http://127.0.0.1:8000).

    Exit status: 0 done, 1 failed, 2 refused before anything was opened, 130 interrupted.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit with its status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "_PISSA_COMPLETE" in os.environ:
        pissa.main(prog_name="pissa")
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _interrupt)
    status = _run(_debug_first(given))
    if status == ExitStatus.INTERRUPTED:  # whoever presses Ctrl-C once more has been heard
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    ended = status in (ExitStatus.DONE, ExitStatus.INTERRUPTED)
    if ended and "torch" in sys.modules and _SERVING not in sys.modules:
        # What torch clears up takes a tenth of a second, a matrix in flight seconds, and nothing of
        # a command is left open. A service has processes to end, which it does at its exit.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _run(arguments: list[str]) -> int:
    # Not `pissa.main`: click takes an EOFError, a fault in a file, for Ctrl-D.
    debug = arguments[:1] == [DEBUG]
    try:
        with (
            _planner_for(arguments, debug=debug),
            pissa.make_context("pissa", arguments, obj={"debug": debug}) as context,
        ):
            pissa.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as done:
        return done.exit_code
    except BrokenPipeError:
        # Whoever read stdout has enough, as in `pissa jobs | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitStatus.FAILED
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last resort of all
        return report(error, debug=debug)
    return ExitStatus.DONE


def _planner_for(arguments: list[str], *, debug: bool) -> AbstractContextManager[None]:
    """Begin to plan where a command will, before it is known what."""
    command = next((word for word in arguments if word != DEBUG), None)
    if command not in _PLANNED or {"-h", "--help"} & set(arguments):
        return nullcontext()
    from app.cli.child import begun_ahead

    return begun_ahead(debug=debug)


def _debug_first(arguments: list[str]) -> list[str]:
    """Move ``--debug`` to where click looks for it; behind ``--`` it is an argument."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [word for word in arguments[:end] if word != DEBUG]
    flag = [DEBUG] if len(options) < end else []
    return [*flag, *options, *arguments[end:]]


def _interrupt(number: int, frame: FrameType | None) -> None:
    # SIGTERM asks for what Ctrl-C asks for: put down what is in hand, then end.
    raise KeyboardInterrupt
