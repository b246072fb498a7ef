"""`verify`: a task a shard of the converted model; nothing comes out but the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pissa_core.adapters import request_digest
from pissa_core.errors import SourceChanged
from pissa_core.events import MatrixDone, ShardStarted
from worker.contract import Verify
from worker.holding import Hold
from worker.kinds.telling import Kind
from worker.processes import peak_memory_bytes
from worker.store.tasks import Claim
from worker.wiring import Context

if TYPE_CHECKING:
    from pissa_core.ports import CheckpointSource
    from pissa_core.verify.case import Case

_FINDING = "finding:"
"""Begins the names under which findings lie among the rows."""


def _prepare(context: Context, claim: Claim, hold: Hold) -> None:
    from pissa_core.fold.adapter import adapter_size
    from pissa_core.layout.sidefiles import INITIAL
    from pissa_core.verify.asking import make_case, model_size

    request = context.request_of(claim, Verify)
    original, converted = (
        context.source(claim, ref) for ref in (request.original, request.converted)
    )
    context.check_size(converted.ref, model_size(converted))
    context.check_size(converted.ref, adapter_size(converted, INITIAL))
    case = make_case(original, converted)
    context.check_ranks(converted.ref, (matrix.rank for matrix in case.matrices))
    hold.check()
    context.tasks.planned(claim, case, _digest(claim, original, converted))


def _shard(context: Context, claim: Claim, hold: Hold) -> None:
    from pissa_core.verify.examine import Examined, Examiner

    case, original, converted = _planned(context, claim)
    path = case.units[int(claim.task.partition(":")[2])].path
    matrices = 0
    for event in Examiner.of(case, original, converted).unit(path):
        if isinstance(event, ShardStarted):
            hold.check(context.tasks.shard_started(claim, path, event.matrices, 0))
        elif isinstance(event, MatrixDone):
            matrices += 1
            hold.check(_tell(context, claim, event))
        elif isinstance(event, Examined):
            finding = event.finding.as_dict()
            context.tasks.shard_done(
                claim,
                path,
                nbytes=finding["nbytes"],
                matrices=matrices,
                resumed=False,
                peak=peak_memory_bytes(),
                rows={_FINDING + path: finding},
            )
        else:
            hold.check()


def _tell(context: Context, claim: Claim, event: MatrixDone) -> Any:
    return context.tasks.matrix_done(
        claim, event.row, nbytes=event.nbytes, seconds=event.seconds, resumed=False
    )


def _publish(context: Context, claim: Claim, hold: Hold) -> None:
    from pissa_core.verify.case import Case
    from pissa_core.verify.report import make_report

    if not claim.published:
        hold.check(context.tasks.publishing(claim))
        case = Case.from_json(context.tasks.plan_text(claim.job_id))
        told = context.tasks.rows(claim.job_id)
        rows = [row for name, row in told.items() if not name.startswith(_FINDING)]
        findings = [row for name, row in sorted(told.items()) if name.startswith(_FINDING)]
        report = make_report(case, rows, findings)
        result = _result(claim, report)
        peak = peak_memory_bytes()
        context.tasks.published(claim, result=result, manifest=report, peak=peak)
    context.tasks.finish(claim)


def _discard(context: Context, claim: Claim, hold: Hold) -> None:
    context.tasks.finish(claim)


def _result(claim: Claim, report: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "output": None,
        "manifest": f"/v1/jobs/{claim.job_id}/manifest",
        **report["totals"],
        "faults": sum(len(c["faults"]) + c["more_faults"] for c in report["checks"]),
        "passed": report["passed"],
    }


def _planned(context: Context, claim: Claim) -> tuple[Case, CheckpointSource, CheckpointSource]:
    """Open the two models that were planned.

    Raises:
        SourceChanged: if one is no longer in the state that the case was made from.
    """
    from pissa_core.verify.case import Case

    case = Case.from_json(context.tasks.plan_text(claim.job_id))
    original, converted = (context.source(claim, ref) for ref in (case.source, case.converted))
    if _digest(claim, original, converted) != claim.digest:
        raise SourceChanged(
            f"the files of {case.source} or {case.converted} have changed since the job was "
            "planned",
            hint="it is planned again from what is there now",
        )
    return case, original, converted


def _digest(claim: Claim, original: CheckpointSource, converted: CheckpointSource) -> str:
    return request_digest("verify", [original, converted], {}, claim.job_id)


KIND = Kind(_prepare, _shard, _publish, _discard)
