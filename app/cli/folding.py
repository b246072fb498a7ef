"""One fold in this process: a residual and an adapter in, a plain model out."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from app.cli.conversion import Follower, Result, noting, scratch_folder, scratch_for
from app.cli.planner import asking
from app.cli.progress import Display, Snapshot
from app.lean import quick_imports
from pissa_core.errors import OutputExists, SourceChanged
from pissa_core.events import Event
from pissa_core.refs import LocalRef, Ref, parse_ref, resolve_local

if TYPE_CHECKING:
    from pissa_core.fold.work import Beside
    from pissa_core.plan import Plan
    from pissa_core.ports import CheckpointSink, CheckpointSource, PublishOptions


@dataclass(frozen=True, slots=True)
class FoldingRun:
    """One fold in this process, from what was asked to its result."""

    residual: Ref
    adapter: Ref
    out: Ref
    publish: PublishOptions
    device: str
    limits: Mapping[str, int | None]
    debug: bool

    def run(self, shown: Display) -> Result:
        """Plan, fold, publish; show how far it is."""
        began = time.monotonic()
        shown.show(Snapshot("planning"))
        asked = {"kind": "pissa-to-base", "residual": str(self.residual)}
        asked["adapter"] = str(self.adapter)
        limits = {**self.limits, "scratch": scratch_for(self.out)}
        with asking(asked, debug=self.debug, **limits) as pending:
            with quick_imports():
                from pissa_core.engine import carry_out
                from pissa_core.runtime import Runtime, resolve

            runtime = Runtime(
                self.device,
                self.limits["slots"],
                self.limits["memory_budget"],
                self.limits["disk_budget"],
            )
            resolve(runtime)
            residual, adapter, sink = self._open(shown)
            made = pending.result()
        if made.division is not None:
            sink = self._sink(residual, adapter, shown, made.division)
        follower = Follower(shown, made, began)
        beside = _beside(made, residual, adapter)
        events = carry_out(made, residual, sink, runtime, beside=beside)
        with closing(cast("Generator[Event, None, None]", events)):
            for event in events:
                follower.take(event)
        return follower.result()

    def _open(self, shown: Display) -> tuple[CheckpointSource, CheckpointSource, CheckpointSink]:
        from pissa_core.adapters import open_source

        residual, adapter = (
            open_source(ref, on_wait=noting(shown)) for ref in (self.residual, self.adapter)
        )
        sink = self._sink(residual, adapter, shown)
        try:
            for source in (residual, adapter):
                sink.check(source)
        except OutputExists:
            # It may be our own, of shards divided, which only the plan will show.
            if self.limits["disk_budget"] is None and isinstance(self.out, LocalRef):
                raise
        return residual, adapter, sink

    def _sink(
        self,
        residual: CheckpointSource,
        adapter: CheckpointSource,
        shown: Display,
        division: str | None = None,
    ) -> CheckpointSink:
        from pissa_core.adapters import folding_digest, open_sink

        where = str(resolve_local(self.out)) if isinstance(self.out, LocalRef) else str(self.out)
        return open_sink(
            self.out,
            digest=folding_digest(residual, adapter, where, division),
            scratch=None if isinstance(self.out, LocalRef) else scratch_folder(),
            options=self.publish,
            on_wait=noting(shown),
        )


def _beside(plan: Plan, residual: CheckpointSource, adapter: CheckpointSource) -> Beside:
    from pissa_core.adapters import open_source
    from pissa_core.fold.work import Beside

    assert plan.fold is not None
    states = (plan.commit, residual.commit), (plan.fold.adapter_commit, adapter.commit)
    if any(planned != now for planned, now in states):
        raise SourceChanged(
            "the residual or the adapter moved to another commit while it was planned",
            hint="run the command again",
        )
    original = plan.fold.original
    if original is None:
        return Beside(adapter, None)
    ref = LocalRef(original) if original.startswith("/") else parse_ref(original)
    return Beside(adapter, open_source(ref))
