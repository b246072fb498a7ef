"""`pissa to-lora`: a trained adapter becomes plain LoRA for the original model, in this process."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import click
from pydantic import ValidationError

from app.cli import tables
from app.cli.conversion import noting, scratch_folder
from app.cli.errors import folder_hint, on_interrupt
from app.cli.options import (
    device_option,
    disk_budget_option,
    json_option,
    memory_budget_option,
    slots_option,
)
from app.cli.outputs import options_of, output_options, required_output
from app.cli.progress import Display, Pace, Snapshot, display
from app.cli.units import count, duration, size
from app.lean import quick_imports
from pissa_core.errors import InvalidConfig, PissaError
from pissa_core.events import MatrixDone, Published, Publishing
from pissa_core.layout.sidefiles import MANIFEST
from pissa_core.refs import LocalRef, Ref, parse_ref, resolve_local
from pissa_core.spec import LoraOptions
from pissa_core.wording import wrongs
from worker.processes import peak_memory_bytes

if TYPE_CHECKING:
    from pissa_core.lora.plan import LoraPlan
    from pissa_core.lora.planning import Found
    from pissa_core.ports import CheckpointSink, PublishOptions

INTERRUPTED = "interrupted: the same command begins anew, unless all matrices were done"


@click.command("to-lora")
@click.option("--trained", required=True, metavar="REF", help="The trained PiSSA adapter.")
@click.option(
    "--initial",
    metavar="REF",
    help="The adapter that training began with; left out, it is looked for beside the base that "
    "the trained one names.",
)
@click.option("--out", required=True, metavar="REF", help="Where the LoRA adapter goes.")
@click.option("--rank", type=int, metavar="K", help="The largest rank a module may have.")
@click.option(
    "--tolerance",
    type=float,
    metavar="T",
    help="The share of each module's update (its squared singular values) that may be lost; "
    "ranks become as small as it allows.",
)
@click.option(
    "--uniform",
    is_flag=True,
    help="One rank and scaling for all modules, for servers that read only r and lora_alpha.",
)
@output_options
@device_option
@disk_budget_option
@memory_budget_option
@slots_option
@json_option
def to_lora(
    *,
    trained: str,
    initial: str | None,
    out: str,
    publish: dict[str, Any],
    rank: int | None,
    tolerance: float | None,
    uniform: bool,
    device: str,
    slots: int | None,
    memory_budget: int | None,
    disk_budget: int | None,
    as_json: bool,
) -> None:
    """Turn a trained PiSSA adapter into plain LoRA for the original model.

    Without --rank and --tolerance nothing is lost, and the rank is twice the trained one's.
    """
    work = Way(
        trained=parse_ref(trained),
        initial=None if initial is None else parse_ref(initial),
        out=required_output(out, publish),
        publish=options_of(publish),
        options=lora_options(rank=rank, tolerance=tolerance, uniform=uniform),
        device=device,
        slots=slots,
        memory_budget=memory_budget,
        disk_budget=disk_budget,
    )
    with on_interrupt(INTERRUPTED), folder_hint(work.trained, work.initial), display() as shown:
        result, loader = work.run(shown)
    if as_json:
        tables.print_json(result)
    else:
        _print(result, loader)


def lora_options(**given: Any) -> LoraOptions:
    """Read the options.

    Raises:
        InvalidConfig: naming the one that is wrong.
    """
    try:
        return LoraOptions(**given)
    except ValidationError as error:
        first = wrongs(error.errors(include_url=False), given)[0]
        raise InvalidConfig(f"--{first.place[0]}: {first.why}") from error


@dataclass(frozen=True, slots=True)
class Way:
    """One conversion in this process, from what was asked to its result."""

    trained: Ref
    initial: Ref | None
    out: Ref
    publish: PublishOptions
    options: LoraOptions
    device: str
    slots: int | None
    memory_budget: int | None
    disk_budget: int | None

    def run(self, shown: Display) -> tuple[dict[str, Any], str]:
        """Plan, convert, publish; return the result and the class that loads its base."""
        began = time.monotonic()
        shown.show(Snapshot("planning"))
        with quick_imports():
            from pissa_core.adapters import open_source
            from pissa_core.engine import is_hopeless
            from pissa_core.lora.classes import class_for
            from pissa_core.lora.conversion import convert_adapter
            from pissa_core.lora.planning import check_lora_plan, make_lora_plan, open_adapters
            from pissa_core.runtime import Runtime, resolve

        runtime = Runtime(self.device, self.slots, self.memory_budget, self.disk_budget)
        resolve(runtime)
        open_ref = partial(open_source, on_wait=noting(shown))
        found = open_adapters(self.trained, self.initial, open_ref)
        sink = self._sink(found, shown)
        plan = make_lora_plan(found, self.options, open_ref, slots=self.slots)
        check_lora_plan(plan, found, sink, runtime)
        for note in plan.notes:
            shown.note(f"note: {note}")
        try:
            events = convert_adapter(plan, found.trained, found.initial, sink, runtime)
            published = _follow(events, plan, shown)
        except PissaError as error:
            if is_hopeless(error):
                sink.discard()
            raise
        result = _result(published, plan, time.monotonic() - began)
        return result, class_for(plan.trained_config)

    def _sink(self, found: Found, shown: Display) -> CheckpointSink:
        from pissa_core.adapters import open_sink, request_digest

        where = str(resolve_local(self.out)) if isinstance(self.out, LocalRef) else str(self.out)
        options = self.options.model_dump(mode="json")
        digest = request_digest("pissa-to-lora", [found.trained, found.initial], options, where)
        sink = open_sink(
            self.out,
            digest=digest,
            scratch=None if isinstance(self.out, LocalRef) else scratch_folder(),
            options=self.publish,
            on_wait=noting(shown),
        )
        sink.check(found.trained)
        return sink


def _follow(events: object, plan: LoraPlan, shown: Display) -> Published:
    done = nbytes = 0
    pace, total = Pace(), plan.shards[0].size
    published = None
    with closing(cast("Generator[object, None, None]", events)) as following:
        for event in following:
            if isinstance(event, MatrixDone):
                done, nbytes = done + 1, nbytes + event.nbytes
                pace.add(event.nbytes)
                left_s = pace.left_s(total - nbytes)
                counts = (done, len(plan.matrices), nbytes, total)
                shown.show(Snapshot("converting", "matrices", *counts, pace.rate(), left_s))
            elif isinstance(event, Publishing):
                shown.show(Snapshot("publishing"))
            elif isinstance(event, Published):
                published = event
    if published is None:
        raise PissaError("the conversion ended without a result")
    return published


def _result(published: Published, plan: LoraPlan, seconds: float) -> dict[str, Any]:
    totals = published.manifest["totals"]
    local = published.ref.startswith("/")
    return {
        "output": published.ref,
        "manifest": f"{published.ref}/{MANIFEST}" if local else None,
        "base": plan.base,
        "base_revision": plan.base_revision,
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        **totals,
        "notes": list(plan.notes),
        "passed": None,
    }


def _print(result: dict[str, Any], loader: str) -> None:
    ranks = result["smallest_rank"], result["largest_rank"]
    tables.print_facts(
        {
            "output": result["output"],
            "for the base": result["base"] or "not known",
            "matrices": str(result["matrices"]),
            **tables.lora_facts(ranks, result["max_lost"]),
            "parameters": count(result["parameters"]),
            "time": duration(result["seconds"]),
            "peak memory": size(result["peak_memory_bytes"]),
        }
    )
    base, revision = result["base"], result["base_revision"]
    print(f"\n{tables.lora_snippet(result['output'], base, revision, loader)}")
