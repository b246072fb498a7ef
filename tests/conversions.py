"""One conversion in this process, for tests that look at its result or its course."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pissa_core import engine
from pissa_core.adapters import folding_digest, open_sink, open_source, staging_digest
from pissa_core.events import Event, MatrixDone, Published
from pissa_core.fold.belonging import Open
from pissa_core.fold.planning import make_fold_plan
from pissa_core.fold.work import Beside
from pissa_core.refs import LocalRef
from pissa_core.runtime import Runtime
from pissa_core.spec import parse_config
from pissa_core.verify.asking import make_case
from pissa_core.verify.case import Case
from pissa_core.verify.examine import Examined, examine
from pissa_core.verify.report import make_report


def course_of(
    model: Path, output: Path, config: Mapping[str, Any] | None = None, **runtime: Any
) -> Iterator[Event]:
    """Return the events of a conversion from folder to folder, as they happen."""
    accepted = parse_config(config or {})
    source = open_source(LocalRef(str(model)))
    digest = staging_digest(source, accepted, str(output))
    sink = open_sink(LocalRef(str(output)), digest=digest)
    return engine.convert(source, sink, accepted, Runtime(**{"device": "cpu", **runtime}))


def convert_to(
    model: Path, output: Path, config: Mapping[str, Any] | None = None, **runtime: Any
) -> Mapping[str, Any]:
    """Convert from folder to folder; return the manifest."""
    events = list(course_of(model, output, config, **runtime))
    (published,) = [event for event in events if isinstance(event, Published)]
    return published.manifest


def checksums(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def header_of(path: Path) -> bytes:
    """Return a safetensors file's header, its length included."""
    content = path.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


def fold_to(
    residual: Path,
    adapter: Path,
    output: Path,
    open_other: Open = open_source,
    *,
    limits: Mapping[str, Any] | None = None,
    **runtime: Any,
) -> Mapping[str, Any]:
    """Fold an adapter into its residual, from folders to a folder; return the manifest."""
    events = list(folding_of(residual, adapter, output, open_other, limits=limits, **runtime))
    (published,) = [event for event in events if isinstance(event, Published)]
    return published.manifest


def folding_of(
    residual: Path,
    adapter: Path,
    output: Path,
    open_other: Open = open_source,
    *,
    limits: Mapping[str, Any] | None = None,
    **runtime: Any,
) -> Iterator[Event]:
    """Return the events of a fold from folder to folder, as they happen."""
    source, beside = (open_source(LocalRef(str(folder))) for folder in (residual, adapter))
    plan = make_fold_plan(source, beside, open_other, **(limits or {}))
    digest = folding_digest(source, beside, str(output), plan.division)
    sink = open_sink(LocalRef(str(output)), digest=digest)
    original = open_other(LocalRef(plan.fold.original)) if plan.fold.original else None
    return engine.carry_out(
        plan,
        source,
        sink,
        Runtime(**{"device": "cpu", **runtime}),
        beside=Beside(beside, original),
    )


def verified(original: Path, converted: Path) -> dict[str, Any]:
    """Verify a pair in this process; return the report."""
    sources = open_source(LocalRef(str(original))), open_source(LocalRef(str(converted)))
    case = make_case(*sources)
    assert Case.from_json(case.to_json()) == case
    events = list(examine(case, *sources))
    rows = [event.row for event in events if isinstance(event, MatrixDone)]
    findings = [event.finding.as_dict() for event in events if isinstance(event, Examined)]
    report = make_report(case, rows, findings)
    json.dumps(report, allow_nan=False)
    return report
