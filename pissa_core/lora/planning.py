"""Two adapters and the options become a plan: headers read, everything compared and refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pissa_core.adapters.ledger import disk_too_small
from pissa_core.admission import traffic_of
from pissa_core.errors import DiskTooSmall
from pissa_core.lora.adapter import WEIGHTS, Adapter, Pair, read_adapter, read_config
from pissa_core.lora.finding import HERE, Opener, find_initial
from pissa_core.lora.layout import scratch_bytes
from pissa_core.lora.lineage import trace
from pissa_core.lora.matching import check_match
from pissa_core.lora.plan import LoraPlan, Update
from pissa_core.lora.updates import working_bytes
from pissa_core.ports import CheckpointSink, CheckpointSource
from pissa_core.refs import Ref
from pissa_core.runtime import Runtime
from pissa_core.slots import usable_cores
from pissa_core.spec import LoraOptions


@dataclass(frozen=True, slots=True)
class Found:
    """Both adapters' files; `initial_ref` is what was asked for or found."""

    trained: CheckpointSource
    initial_ref: Ref
    initial: CheckpointSource


def open_adapters(
    trained: Ref, initial: Ref | None, open_ref: Opener, *, root: Path | None = HERE
) -> Found:
    """Open the trained adapter, and the initial one or what the trained one's base leads to.

    `root`: as of `finding.base_of`.
    """
    source = open_ref(trained)
    ref, beside = find_initial(read_config(source), initial, open_ref, root=root)
    return Found(source, ref, beside)


def make_lora_plan(
    found: Found,
    options: LoraOptions,
    open_ref: Opener,
    *,
    slots: int | None = None,
    root: Path | None = HERE,
) -> LoraPlan:
    """Compare both adapters and decide what becomes of every tensor; reads no factor.

    The file of the initial adapter is read once for its checksum, where a manifest lists it and
    the source does not know it. `root`: as of `finding.base_of`.

    Raises:
        UnsupportedAdapter: if one of them cannot be converted correctly.
        AdaptersDoNotMatch, WrongBase: if they do not belong together.
    """
    trained, initial = read_adapter(found.trained), read_adapter(found.initial)
    check_match(trained, initial)
    lineage = trace(trained, initial, found.initial_ref, found.initial, open_ref, root=root)
    updates = _updates(trained, initial, options)
    flights = sorted((working_bytes(update, options) for update in updates), reverse=True)
    return LoraPlan(
        source=trained.ref,
        commit=trained.commit,
        initial=initial.ref,
        initial_commit=initial.commit,
        base=lineage.base,
        base_revision=lineage.revision,
        residual=lineage.residual,
        trained_config=trained.config,
        config=options.model_dump(mode="json"),
        updates=updates,
        carried=trained.carried,
        left_out=trained.left_out,
        notes=(*lineage.notes, *_left_out_note(trained)),
        peak_memory=sum(flights[: slots or usable_cores()]),
    )


def check_lora_plan(plan: LoraPlan, found: Found, sink: CheckpointSink, runtime: Runtime) -> None:
    """Refuse, before a factor is read, an output or a disk that cannot take the result."""
    for source in (found.trained, found.initial):
        sink.check(source)
    needed = scratch_bytes(plan, (found.trained, found.initial))
    free = sink.free_bytes()
    if free is not None and needed > free:
        raise DiskTooSmall(
            f"the output needs {needed:,} bytes of disk and {free:,} are free where {sink.ref} "
            "would lie",
            hint="free some space, or choose an output on another disk",
        )
    ledger = traffic_of(runtime, sink).ledger
    if ledger is not None and needed > (capacity := ledger.capacity()):
        raise disk_too_small(needed, capacity, what=WEIGHTS)


def _updates(trained: Adapter, initial: Adapter, options: LoraOptions) -> tuple[Update, ...]:
    pairs = [(pair, initial.pairs[module]) for module, pair in trained.pairs.items()]
    widest = max(2 * pair.rank for pair, _ in pairs)
    most = (options.rank or widest) if options.compresses(widest) else None
    return tuple(Update(pair, other, _bound(pair, most)) for pair, other in pairs)


def _bound(pair: Pair, most: int | None) -> int:
    """Return the largest rank the result may have: 2r, or what an SVD to a rank can give."""
    return 2 * pair.rank if most is None else min(most, 2 * pair.rank, *pair.shape)


def _left_out_note(trained: Adapter) -> tuple[str, ...]:
    if not trained.left_out:
        return ()
    more = f" and {len(trained.left_out) - 1} more" * (len(trained.left_out) > 1)
    return (
        f"{trained.left_out[0]}{more} is left out: the residual's weight, which the original "
        "base has a better one for",
    )
