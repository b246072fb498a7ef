"""`pissa plan` and `pissa convert`: what runs in this process, with no service."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from app.cli import tables
from app.cli.conversion import Conversion, scratch_for
from app.cli.errors import ExitStatus, folder_hint, on_interrupt
from app.cli.folding import FoldingRun
from app.cli.options import (
    budget_options,
    config_options,
    device_option,
    json_option,
)
from app.cli.outputs import options_of, output_options, required_output
from app.cli.planner import plan_in_child
from app.cli.progress import Snapshot, display
from app.cli.verification import Verification, print_report
from pissa_core.errors import error_from
from pissa_core.refs import parse_ref
from pissa_core.spec import parse_config

GRACE_S = 5.0
"""How long an interrupted conversion may take to finish the matrices in flight."""

RESUME = "interrupted: the same command goes on where this one stopped"


@click.command()
@click.argument("model")
@click.option(
    "--out", metavar="REF", help="Where a result would go; the disk needed depends on it."
)
@config_options
@budget_options
@json_option
@click.pass_obj
def plan(
    settings: dict[str, Any],
    *,
    model: str,
    out: str | None,
    pissa: dict[str, Any],
    limits: dict[str, int | None],
    as_json: bool,
) -> None:
    """Show what a conversion would do.

    Only headers are read. MODEL is org/name, org/name@revision, hf://org/name/subfolder or a
    local folder (./path).
    """
    config, ref = parse_config(pissa), parse_ref(model)
    scratch = None if out is None else scratch_for(parse_ref(out))
    with display() as shown, folder_hint(ref):
        shown.show(Snapshot("planning"))
        made = plan_in_child(
            str(ref), config, debug=settings["debug"], **{**limits, "scratch": scratch}
        )
    if as_json:
        tables.print_json(made.public())
    else:
        tables.print_plan(made.public())
    if made.refused:
        first = made.refused[0]
        raise error_from(first.code, f"{first.name}: {first.reason}")


@click.command()
@click.argument("model")
@click.option("--out", required=True, metavar="REF", help="Where the result goes.")
@output_options
@config_options
@device_option
@budget_options
@json_option
@click.pass_obj
def convert(
    settings: dict[str, Any],
    *,
    model: str,
    out: str,
    publish: dict[str, Any],
    pissa: dict[str, Any],
    device: str,
    limits: dict[str, int | None],
    as_json: bool,
) -> None:
    """Convert MODEL here, in this process.

    The result is a residual model with its initial PiSSA adapter in pissa_init/: in a new folder
    (./out), or on the Hub (org/name), where it is staged out of sight and shown by one commit.
    Interrupted at any moment, the same command goes on where it stopped.
    """
    job = Conversion(
        parse_ref(model),
        required_output(out, publish),
        parse_config(pissa),
        publish=options_of(publish),
        device=device,
        limits=limits,
        debug=settings["debug"],
    )
    with on_interrupt(RESUME), _prompt_end(), folder_hint(job.model), display() as shown:
        result = job.run(shown)
    if as_json:
        tables.print_json(result.as_dict())
        return
    tables.print_result(result.as_dict())
    print(f"\n{tables.loading_snippet(*result.how_to_load())}")


@click.command("to-base")
@click.option("--residual", required=True, metavar="REF", help="The residual model.")
@click.option("--adapter", required=True, metavar="REF", help="The initial or a trained adapter.")
@click.option("--out", required=True, metavar="REF", help="Where the result goes.")
@output_options
@device_option
@budget_options
@json_option
@click.pass_obj
def to_base(
    settings: dict[str, Any],
    *,
    residual: str,
    adapter: str,
    out: str,
    publish: dict[str, Any],
    device: str,
    limits: dict[str, int | None],
    as_json: bool,
) -> None:
    """Merge an adapter into its residual model; a plain model comes out.

    With the initial adapter (pissa_init/ of the residual) it is the original again, with a trained
    one the trained model. Interrupted at any moment, the same command goes on where it stopped.
    """
    job = FoldingRun(
        parse_ref(residual),
        parse_ref(adapter),
        required_output(out, publish),
        publish=options_of(publish),
        device=device,
        limits=limits,
        debug=settings["debug"],
    )
    with (
        on_interrupt(RESUME),
        _prompt_end(),
        folder_hint(job.residual, job.adapter),
        display() as shown,
    ):
        result = job.run(shown)
    if as_json:
        tables.print_json(result.as_dict())
        return
    tables.print_folded(result.as_dict())
    print(f"\n{tables.plain_snippet(*result.how_to_load())}")


@click.command()
@click.option("--original", required=True, metavar="REF", help="The model that was converted.")
@click.option("--converted", required=True, metavar="REF", help="The output of the conversion.")
@json_option
@click.pass_obj
def verify(settings: dict[str, Any], *, original: str, converted: str, as_json: bool) -> None:
    """Check that a converted model is what it says and gives the original back.

    Every file is read once. Exit status 0: passed; 1: a fault was found.
    """
    job = Verification(parse_ref(original), parse_ref(converted), debug=settings["debug"])
    with folder_hint(job.original, job.converted), display() as shown:
        report = job.run(shown)
    if as_json:
        tables.print_json(report)
    else:
        print_report(report)
    if not report["passed"]:
        raise click.exceptions.Exit(ExitStatus.FAILED)


@contextmanager
def _prompt_end() -> Iterator[None]:
    """Keep an interrupt from waiting for matrices in flight, which may take minutes.

    The second signal, or `GRACE_S` after the first, ends the process as it stands: every
    finished matrix is in the journal, so nothing that is done is lost.
    """
    signals = [
        number
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    before = {number: signal.signal(number, _on_signal) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_signal(number: int, frame: FrameType | None) -> None:
    for again in (signal.SIGINT, signal.SIGTERM):
        signal.signal(again, lambda *_: _end_now())
    timer = threading.Timer(GRACE_S, _end_now)
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def _end_now() -> None:
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    sys.stderr.write(f"{show_cursor}{RESUME}\n")
    sys.stderr.flush()
    os._exit(ExitStatus.INTERRUPTED)
