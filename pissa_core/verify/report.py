"""The verdict: every check, what it looked at, what it found; JSON data, the manifest of a job."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pissa_core.report.figures import energy_share
from pissa_core.report.manifest import SCHEMA, versions
from pissa_core.verify.case import CHECKS, Case, Fault
from pissa_core.verify.claims import figure_faults, file_faults

_MOST_FAULTS = 100


def make_report(
    case: Case, rows: Sequence[Mapping[str, Any]], findings: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """Put together what the units found.

    Args:
        case: what was looked at.
        rows: a row a target, as measured, in any order.
        findings: `Finding.as_dict` of every unit.
    """
    findings = list(findings)
    files = {path: info for finding in findings for path, info in finding["files"].items()}
    faults = [*case.faults, *(Fault(**fault) for f in findings for fault in f["faults"])]
    if case.manifest:
        faults += [*file_faults(case.manifest, files), *figure_faults(case.manifest, rows)]
    order = {matrix.module: number for number, matrix in enumerate(case.matrices)}
    ordered = sorted(rows, key=lambda row: order[row["module"]])
    checked = _checked(case, ordered, findings)
    checks = [_check(name, checked[name], faults) for name in CHECKS]
    passed = not faults and not case.unchecked
    return {
        "schema": SCHEMA,
        "kind": "verify",
        "source": {"ref": case.source, "commit": case.commit},
        "converted": {"ref": case.converted, "commit": case.converted_commit},
        "config": dict(case.config),
        "versions": versions(),
        "files": dict(sorted(files.items())),
        "matrices": [dict(row) for row in ordered],
        "checks": checks,
        "unchecked": list(case.unchecked),
        "notes": list(case.notes),
        "totals": _totals(case, ordered),
        "passed": passed,
    }


def _checked(
    case: Case, rows: Sequence[Mapping[str, Any]], findings: Sequence[Mapping[str, Any]]
) -> dict[str, int]:
    counted = dict.fromkeys(CHECKS, 0)
    for finding in findings:
        for check, count in finding["checked"].items():
            counted[check] += count
    counted["manifest"] = 1 if case.manifest else 0
    counted["adapter"] += len(case.pieces) - len(case.carried)
    counted["figures"] = len(rows) if case.manifest else 0
    return counted


def _check(name: str, checked: int, faults: Sequence[Fault]) -> dict[str, Any]:
    own = [fault for fault in faults if fault.check == name]
    return {
        "name": name,
        "asks": CHECKS[name],
        "checked": checked,
        "passed": not own,
        "faults": [asdict(fault) for fault in own[:_MOST_FAULTS]],
        "more_faults": max(0, len(own) - _MOST_FAULTS),
    }


def _totals(case: Case, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    stated = case.manifest.get("totals")
    missed = stated.get("max_missed") if isinstance(stated, dict) else None
    errors = [row["recombination_error"] for row in rows]
    return {
        "matrices": len(rows),
        "energy": energy_share(rows),
        # A full SVD would be needed to measure it anew.
        "max_missed": missed,
        "max_recombination_error": max(filter(None, errors), default=0.0 if rows else None),
        "max_bound_used": max((row["bound_used"] for row in rows), default=None),
    }
