"""One conversion in this process: from what was asked to the result, with progress on the way."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from app.cli.planner import planning
from app.cli.progress import Display, Pace, Snapshot, pause_line
from app.cli.tables import repo_and_revision
from app.lean import quick_imports
from pissa_core.errors import OutputExists, PissaError, SourceChanged
from pissa_core.events import (
    Event,
    MatrixDone,
    Planned,
    Published,
    Publishing,
    ShardSealed,
    ShardStarted,
)
from pissa_core.layout.sidefiles import MANIFEST
from pissa_core.refs import HubRef, LocalRef, Ref, resolve_local
from pissa_core.spec import PissaConfig
from worker.processes import peak_memory_bytes

if TYPE_CHECKING:
    from pissa_core.adapters.hub import Notice, Pause
    from pissa_core.plan import Plan
    from pissa_core.ports import CheckpointSink, CheckpointSource, PublishOptions


HUGE_PAGES = ("THP_MEM_ALLOC_ENABLE", "1")
"""Has torch ask for huge pages: a matrix is in memory in a thirtieth of the page faults."""


SHORTEST_NOTED_S = 2.0
"""Shorter pauses of the Hub are not worth a line."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a conversion came to; the same fields as a job's result."""

    output: str
    totals: dict[str, Any]
    seconds: float
    phase_seconds: dict[str, float]
    peak_memory_bytes: int
    model_class: str | None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the fields of REST's result."""
        return {
            "output": self.output,
            "manifest": f"{self.output}/{MANIFEST}",
            "seconds": round(self.seconds, 3),
            "phase_seconds": {name: round(s, 3) for name, s in self.phase_seconds.items()},
            "peak_memory_bytes": self.peak_memory_bytes,
            **self.totals,
            "passed": None,
            "notes": list(self.notes),
        }

    def how_to_load(self) -> tuple[str, str | None, str | None]:
        """Return base, revision and class for the loading snippet."""
        return *repo_and_revision(self.output), self.model_class


@dataclass(frozen=True, slots=True)
class Conversion:
    """One conversion in this process, from what was asked to its result."""

    model: Ref
    out: Ref
    config: PissaConfig
    publish: PublishOptions
    device: str
    limits: Mapping[str, int | None]
    debug: bool

    def run(self, shown: Display) -> Result:
        """Plan, convert, publish; show how far it is."""
        began = time.monotonic()
        shown.show(Snapshot("planning"))
        limits = {**self.limits, "scratch": scratch_for(self.out)}
        with planning(str(self.model), self.config, debug=self.debug, **limits) as pending:
            # torch is imported here while the child plans; an output that cannot be is found
            # long before the plan is made.
            os.environ.setdefault(*HUGE_PAGES)
            with quick_imports():
                from pissa_core.engine import convert as run_engine
                from pissa_core.headstart import HeadStart
                from pissa_core.runtime import Runtime, resolve

            runtime = Runtime(
                self.device,
                self.limits["slots"],
                self.limits["memory_budget"],
                self.limits["disk_budget"],
            )
            source, sink = self._open(shown)
            with closing(HeadStart(source, self.config, resolve(runtime))) as head_start:
                made = pending.result()
                sink = self._settled(made, source, sink, shown)
                follower = Follower(shown, made, began)
                events = run_engine(
                    source, sink, self.config, runtime, plan=made, head_start=head_start
                )
                with closing(cast("Generator[Event, None, None]", events)):
                    for event in events:
                        follower.take(event)
        return follower.result()

    def _settled(
        self, made: Plan, source: CheckpointSource, sink: CheckpointSink, shown: Display
    ) -> CheckpointSink:
        """Return the sink that the plan asks for, which may divide shards."""
        if made.commit != source.commit:
            raise SourceChanged(
                f"{self.model} moved from commit {source.commit} to {made.commit} meanwhile",
                hint="run the command again",
            )
        return sink if made.division is None else self._sink(source, shown, made.division)

    def _open(self, shown: Display) -> tuple[CheckpointSource, CheckpointSink]:
        from pissa_core.adapters import open_source

        source = open_source(self.model, on_wait=noting(shown))
        sink = self._sink(source, shown)
        try:
            sink.check(source)
        except OutputExists:
            # It may be our own, of shards divided, which only the plan will show.
            if self.limits["disk_budget"] is None and isinstance(self.out, LocalRef):
                raise
        return source, sink

    def _sink(
        self, source: CheckpointSource, shown: Display, division: str | None = None
    ) -> CheckpointSink:
        from pissa_core.adapters import open_sink, staging_digest

        where = str(resolve_local(self.out)) if isinstance(self.out, LocalRef) else str(self.out)
        return open_sink(
            self.out,
            digest=staging_digest(source, self.config, where, division),
            scratch=None if isinstance(self.out, LocalRef) else scratch_folder(),
            options=self.publish,
            on_wait=noting(shown),
        )


def scratch_for(out: Ref) -> str | None:
    """Return where work in progress lies if the result goes elsewhere."""
    return str(scratch_folder()) if isinstance(out, HubRef) else None


def scratch_folder() -> Path:
    """Return where work in progress lies whose result goes to the Hub."""
    from worker.settings import Settings

    return Settings.from_env().scratch_dir


def noting(shown: Display) -> Notice:
    """Return what tells the user of the Hub's pauses."""

    def note(pause: Pause | None) -> None:
        if pause is not None and pause.seconds >= SHORTEST_NOTED_S:
            shown.note(pause_line(pause.seconds, pause.error.message))

    return note


@dataclass(slots=True)
class _UnderWay:
    """What is done of a shard that is not sealed yet."""

    matrices: int = 0
    nbytes: int = 0

    def add(self, nbytes: int) -> None:
        self.matrices += 1
        self.nbytes += nbytes


@dataclass(slots=True)
class Follower:
    """Turns the engine's events into progress and, at the end, a result."""

    shown: Display
    plan: Plan
    began: float
    pace: Pace = field(default_factory=Pace)
    _matrices: int = 0
    _sealed: int = 0
    _under_way: dict[str, _UnderWay] = field(default_factory=dict)
    _published: Published | None = None
    _marks: dict[str, float] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        """Count one event and show how far the work is."""
        match event:
            case Planned(plan=plan):
                if plan.card_without:
                    fields = ", ".join(plan.card_without)
                    self.shown.note(
                        f"note: the Hub refuses {fields} of the source's model card; the result's "
                        "card leaves it out"
                    )
                for note in plan.notes:
                    self.shown.note(f"note: {note}")
                self._marks["planning"] = time.monotonic()
                self.pace = Pace()
            case ShardStarted(resumed=resumed) if resumed:
                self.shown.note(f"{event.shard}: {resumed} matrices are done already")
            case MatrixDone(nbytes=nbytes):
                self._matrices += 1
                self._under_way.setdefault(event.shard, _UnderWay()).add(nbytes)
                self.pace.add(0 if event.resumed else nbytes)
            case ShardSealed():
                self._seal(event)
            case Publishing():
                self._marks["shards"] = time.monotonic()
            case Published():
                self._marks["publishing"] = time.monotonic()
                self._published = event
        self.shown.show(self.snapshot())

    def snapshot(self) -> Snapshot:
        """Say how far the work is."""
        if "shards" in self._marks:
            return Snapshot("publishing")
        total = sum(shard.size for shard in self.plan.shards)
        done = self._sealed + sum(shard.nbytes for shard in self._under_way.values())
        return Snapshot(
            label="converting",
            noun="matrices",
            done=self._matrices,
            total=len(self.plan.matrices),
            nbytes=done,
            total_nbytes=total,
            rate=self.pace.rate(),
            left_s=self.pace.left_s(total - done),
        )

    def result(self) -> Result:
        """Return the result.

        Raises:
            PissaError: if the engine ended without publishing, which it never should.
        """
        if self._published is None:
            raise PissaError("the conversion ended without a result")
        marks = [self.began, *self._marks.values()]
        spans = (later - sooner for sooner, later in pairwise(marks))
        return Result(
            output=self._published.ref,
            totals=dict(self._published.manifest["totals"]),
            seconds=marks[-1] - marks[0],
            phase_seconds=dict(zip(self._marks, spans, strict=True)),
            peak_memory_bytes=peak_memory_bytes(),
            model_class=self.plan.model_class,
            notes=self.plan.notes,
        )

    def _seal(self, event: ShardSealed) -> None:
        # Matrices of a shard sealed by an earlier run come with no events of their own.
        seen = self._under_way.pop(event.shard, _UnderWay())
        self._matrices += event.matrices - seen.matrices
        self.pace.add(0 if event.resumed else max(event.nbytes - seen.nbytes, 0))
        self._sealed += event.nbytes
