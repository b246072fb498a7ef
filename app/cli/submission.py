"""`pissa submit`: what the command line asks for becomes the body of a job of any kind."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from app.cli import tables
from app.cli.client import follow_and_print, goes_on
from app.cli.errors import ServiceUnreachable, on_interrupt
from app.cli.http import Service
from app.cli.options import config_options, json_option, max_shard_size_option, settings
from app.cli.outputs import output_options, refuse, required_output
from app.cli.to_lora import lora_options
from pissa_core.refs import HubRef, Ref, parse_ref
from pissa_core.spec import parse_config
from worker.terms import KINDS

_BASE, _LORA, _FOLD, _VERIFY = KINDS
_NEEDED = {
    _BASE: ("model",),
    _LORA: ("trained",),
    _FOLD: ("residual", "adapter"),
    _VERIFY: ("original", "converted"),
}
_OPTIONAL = {_LORA: ("initial",)}


@click.command()
@click.argument("model", required=False)
@click.option(
    "--kind",
    type=click.Choice(KINDS),
    default=_BASE,
    show_default=True,
    help="What to do; each kind but the first has its references as options.",
)
@click.option("--trained", metavar="REF", help="pissa-to-lora: the trained PiSSA adapter.")
@click.option(
    "--initial",
    metavar="REF",
    help="pissa-to-lora: the adapter that training began with; left out, it is looked for beside "
    "the base that the trained one names.",
)
@click.option(
    "--tolerance", type=float, metavar="T", help="pissa-to-lora: the share that may be lost."
)
@click.option("--uniform", is_flag=True, help="pissa-to-lora: one rank and scaling for all.")
@click.option("--residual", metavar="REF", help="pissa-to-base: the residual model.")
@click.option("--adapter", metavar="REF", help="pissa-to-base: the initial or a trained adapter.")
@click.option("--original", metavar="REF", help="verify: the model that was converted.")
@click.option("--converted", metavar="REF", help="verify: the output of the conversion.")
@click.option("--out", metavar="REF", help="Where the result goes; else the service keeps it.")
@max_shard_size_option
@output_options
@config_options
@click.option("--wait", is_flag=True, help="Follow the job to its end; exit 1 if it fails.")
@json_option
def submit(
    *,
    kind: str,
    out: str | None,
    max_shard_size: int | None,
    publish: dict[str, Any],
    pissa: dict[str, Any],
    tolerance: float | None,
    uniform: bool,
    wait: bool,
    as_json: bool,
    **refs: str | None,
) -> None:
    """Submit a job: convert MODEL, or what --kind says.

    Prints the job's id. Of the config options, --rank alone is for pissa-to-lora, too.
    Local folders are the service's: relative ones start at its PISSA_LOCAL_ROOT.
    """
    body: dict[str, Any] = {"kind": kind, **_references(kind, refs)}
    lora = {"tolerance": tolerance, "uniform": uniform or None}
    body |= _options(kind, pissa, {name: v for name, v in lora.items() if v is not None})
    body |= _output(kind, out, max_shard_size, publish)
    service = Service.from_environment()
    job = _post_once(service, body)
    if not wait:
        tables.print_json(job) if as_json else print(job["id"])
        return
    with on_interrupt(goes_on(job["id"])):
        if not as_json:
            print(job["id"], flush=True)
        follow_and_print(service, job["id"], as_json=as_json)


def _references(kind: str, refs: Mapping[str, str | None]) -> dict[str, str]:
    """Return what is read, by the names that REST has for it.

    Raises:
        UsageError: if something is missing, or is another kind's.
        InvalidReference: if one is none.
    """
    given = {name: ref for name, ref in refs.items() if ref is not None}
    for name in _NEEDED[kind]:
        if name not in given:
            raise click.UsageError(f"--kind {kind} needs {_spelled(name)}")
    for name, ref in given.items():
        if name not in (*_NEEDED[kind], *_OPTIONAL.get(kind, ())):
            raise click.UsageError(f"--kind {kind} has no {_spelled(name)}")
        _note_folder(ref, parse_ref(ref))
    return given


def _note_folder(named: str, ref: Ref) -> None:
    """Tell someone who wrote ``model`` and meant the folder here what the service will take."""
    if ref == HubRef(named) and Path(named).is_dir():
        click.echo(
            f"note: {named} is asked of the Hub; a folder of the service's is ./{named}, below its "
            "PISSA_LOCAL_ROOT",
            err=True,
        )


def _spelled(name: str) -> str:
    return "MODEL" if name == "model" else f"--{name}"


def _options(kind: str, pissa: dict[str, Any], lora: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a kind, under REST's name for them.

    Raises:
        UsageError: if one is another kind's.
        InvalidConfig: if one is wrong.
    """
    if kind == _LORA:
        lora = {**({"rank": pissa.pop("rank")} if "rank" in pissa else {}), **lora}
    if kind != _BASE and pissa:
        raise click.UsageError(f"--kind {kind} has no {_typed(kind)}")
    if kind != _LORA and lora:
        raise click.UsageError(f"--kind {kind} has no --{next(iter(lora))}")
    if kind == _BASE:
        parse_config(pissa)
        return {"pissa": pissa}
    if kind == _LORA:
        lora_options(**lora)
        return {"lora": lora}
    return {}


def _typed(kind: str) -> str:
    """Name the options about a conversion's config, as they were typed."""
    given = click.get_current_context().params
    flags = [
        setting.flag for setting in settings() if given.get(setting.parameter) not in (None, ())
    ]
    if kind == _LORA:
        flags = [flag for flag in flags if flag != "--rank"]
    return ", ".join([*flags, *(["--config"] if given.get("config_file") else [])])


def _output(
    kind: str, out: str | None, max_shard_size: int | None, publish: dict[str, Any]
) -> dict[str, Any]:
    if kind == _VERIFY and out is not None:
        raise click.UsageError("--kind verify writes nothing, and has no --out")
    if max_shard_size is not None and (out is None or kind != _BASE):
        raise click.UsageError(
            "--max-shard-size is about the output of a conversion; name one with --out"
        )
    if out is None:
        refuse(publish)
        return {}
    required_output(out, publish)
    sized = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    return {"output": {"ref": out, **publish, **sized} if publish or sized else out}


def _post_once(service: Service, body: Mapping[str, Any]) -> dict[str, Any]:
    """Submit a job; where only the answer was lost on the way, asking again makes no second one."""
    key = {"Idempotency-Key": str(uuid.uuid4())}
    try:
        return service.post("v1/jobs", body, headers=key, with_hub_token=True)
    except ServiceUnreachable:
        return service.post("v1/jobs", body, headers=key, with_hub_token=True)
