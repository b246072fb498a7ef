"""One verification in this process: original and converted model in, a report out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from app.cli import tables
from app.cli.planner import asking
from app.cli.progress import Display, Pace, Snapshot
from app.lean import quick_imports
from pissa_core.errors import SourceChanged
from pissa_core.events import MatrixDone, ShardStarted
from pissa_core.layout.sidefiles import INITIAL, MANIFEST
from pissa_core.refs import Ref
from worker.processes import peak_memory_bytes

if TYPE_CHECKING:
    from pissa_core.verify.case import Case


_TELLING = 2
_MOST_A_CHECK = 10


@dataclass(slots=True)
class Verification:
    """One verification, from what was asked to the report."""

    original: Ref
    converted: Ref
    debug: bool
    pace: Pace = field(default_factory=Pace)

    def run(self, shown: Display) -> dict[str, Any]:
        """Read headers, then everything; show how far it is; return report and figures."""
        began = time.monotonic()
        shown.show(Snapshot("planning"))
        asked = {"kind": "verify", "original": str(self.original)}
        asked["converted"] = str(self.converted)
        with asking(asked, debug=self.debug) as pending:
            with quick_imports():
                from pissa_core.adapters import open_source
                from pissa_core.verify.case import Case
                from pissa_core.verify.examine import Compared, Examined, examine
                from pissa_core.verify.report import make_report

            sources = [open_source(ref) for ref in (self.original, self.converted)]
            case = Case.from_json(pending.text())
        if (case.commit, case.converted_commit) != tuple(source.commit for source in sources):
            raise SourceChanged(
                "the original or the converted model moved to another commit meanwhile",
                hint="run the command again",
            )
        rows, findings = [], []
        self.pace = Pace()
        done, within = 0, 0
        for event in examine(case, *sources):
            match event:
                case ShardStarted():
                    within = 0
                case MatrixDone(nbytes=nbytes) | Compared(nbytes=nbytes):
                    within += nbytes
                    self.pace.add(nbytes)
                    if isinstance(event, MatrixDone):
                        rows.append(event.row)
                case Examined(finding):
                    findings.append(finding.as_dict())
                    done += finding.nbytes
                    self.pace.add(max(0, finding.nbytes - within))
                    within = 0
            shown.show(self._snapshot(case, len(rows), done + within))
        report = make_report(case, rows, findings)
        return {
            **report,
            "seconds": round(time.monotonic() - began, 3),
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def _snapshot(self, looked_at: Case, matrices: int, done: int) -> Snapshot:
        total = sum(unit.size for unit in looked_at.units)
        return Snapshot(
            label="comparing",
            noun="matrices",
            done=matrices,
            total=len(looked_at.matrices),
            nbytes=done,
            total_nbytes=total,
            rate=self.pace.rate(),
            left_s=self.pace.left_s(total - done),
        )


def _stranger(report: Mapping[str, Any]) -> str | None:
    """Say that the converted model is no pair of ours, if it has nothing that makes it one."""
    if any(path.split("/")[0] in (MANIFEST, INITIAL) for path in report["files"]):
        return None
    return (
        f"{report['converted']['ref']} is no output of `pissa convert`: it has neither {INITIAL}/ "
        f"nor a {MANIFEST} of that kind"
    )


def print_first_faults(report: Mapping[str, Any]) -> None:
    """Print what tells most of a report that is read elsewhere: a fault each of two checks."""
    print()
    if sentence := _stranger(report):
        print(sentence)
    failed = [check for check in report["checks"] if check["faults"]]
    for check in failed[:_TELLING]:
        _print_fault(check["name"], check["faults"][0])
    faults = sum(len(check["faults"]) + check["more_faults"] for check in failed)
    if more := faults - len(failed[:_TELLING]):
        print(f"and {more} more, in the report under `checks`")
    for sentence in report["unchecked"]:
        print(f"not checked: {sentence}")


def _print_fault(check: str, fault: Mapping[str, str]) -> None:
    print(f"fault[{check}] {fault['where']}: {fault['what']}")


def _print_faults(checks: Iterable[Mapping[str, Any]]) -> None:
    for check in checks:
        for fault in check["faults"][:_MOST_A_CHECK]:
            _print_fault(check["name"], fault)
        if more := len(check["faults"][_MOST_A_CHECK:]) + check["more_faults"]:
            print(f"fault[{check['name']}] and {more} more; --json lists more of them")


def print_report(report: Mapping[str, Any]) -> None:
    """Print the checks as a table, then the first faults of each, then the verdict."""
    stranger = _stranger(report)
    if stranger:
        print(f"{stranger}\n")
    tables.print_table(
        ("check", "looked at", "faults", ""),
        [
            (
                check["name"],
                str(check["checked"]),
                str(len(check["faults"]) + check["more_faults"]),
                check["asks"],
            )
            for check in report["checks"]
        ],
        right=(1, 2),
    )
    if stranger:
        print("the faults are those of any other model; --json lists them")
    else:
        _print_faults(report["checks"])
    for sentence in report["unchecked"]:
        print(f"not checked: {sentence}")
    for sentence in report["notes"]:
        print(f"note: {sentence}")
    totals = report["totals"]
    facts = {"verdict": "passed" if report["passed"] else "NOT PASSED"}
    facts["matrices"] = str(totals["matrices"])
    names = {
        "energy": "captured energy",
        "max_recombination_error": "largest recombination error",
        "max_bound_used": "largest share of the bound used",
    }
    facts |= {
        label: f"{totals[name]:.3g}" for name, label in names.items() if totals[name] is not None
    }
    print()
    tables.print_facts(facts)
