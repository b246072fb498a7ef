"""What commands print on stdout: one JSON object, or tables for reading."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from app.cli.units import count, duration, size
from worker.terms import MAIN_SOURCES

Row = Sequence[str]

_KEPT = "kept by the service"


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(header: Row, rows: Iterable[Row], *, right: Sequence[int] = ()) -> None:
    """Print a table; on a terminal it is ruled and fits, in a pipe nothing is cut or wrapped."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    on_terminal = sys.stdout.isatty()
    console = Console(width=None if on_terminal else 100_000, highlight=False, markup=False)
    table = Table(box=box.SIMPLE_HEAD if on_terminal else None, pad_edge=False)
    for index, title in enumerate(header):
        table.add_column(title, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_facts(facts: Mapping[str, str]) -> None:
    """Print names and values, one a line, aligned."""
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def print_plan(plan: Mapping[str, Any]) -> None:
    """Print a plan as `POST /v1/plans` describes it, its matrices grouped by kind."""
    if groups := group_matrices(plan["matrices"]):
        print_table(
            ("modules", "number", "shape", "rank", "scaling"),
            [(kind, str(n), shape, rank, scaling) for (kind, shape, rank, scaling), n in groups],
            right=(1, 3, 4),
        )
        print()
    if plan["refused"]:
        refused = [(name, str(n), code, reason) for (name, code, reason), n in _refusals(plan)]
        print_table(("refused", "number", "code", "reason"), refused, right=(1,))
        print()
    print_facts(_plan_facts(plan))
    for note in plan["notes"]:
        print(f"note: {note}")


def group_matrices(
    matrices: Iterable[Mapping[str, Any]],
) -> list[tuple[tuple[str, str, str, str], int]]:
    """Count matrices that differ in nothing but the numbers in their path.

    560 matrices of a 70B model become seven lines, ``model.layers.*.self_attn.q_proj`` and so on.
    """
    kinds = Counter(
        (
            _unnumbered(matrix["module"]),
            " × ".join(str(length) for length in matrix["shape"]),
            str(matrix["rank"]),
            f"{matrix['scaling']:g}",
        )
        for matrix in matrices
    )
    return list(kinds.items())


def _refusals(plan: Mapping[str, Any]) -> list[tuple[tuple[str, str, str], int]]:
    """Count refusals that differ in nothing but the numbers in a path, as `group_matrices` does."""
    return list(
        Counter(
            (
                _unnumbered(r["name"]),
                r["code"],
                r["reason"].replace(r["name"], _unnumbered(r["name"])),
            )
            for r in plan["refused"]
        ).items()
    )


def _unnumbered(path: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def _plan_facts(plan: Mapping[str, Any]) -> dict[str, str]:
    nbytes = plan["bytes"]
    facts = {
        "source": plan["source"],
        "model class": f"{plan['model_class'] or 'unknown'} (names from {plan['names_from']})",
        "matrices": str(len(plan["matrices"])),
        "trainable parameters": count(plan["trainable_parameters"]),
        "read": size(nbytes["read"]),
        "written": f"{size(nbytes['written'])}, of it adapter {size(nbytes['adapter'])}",
        "peak memory": f"about {size(plan['peak_memory_bytes'])}",
        "peak disk": f"about {size(plan['peak_disk_bytes'])}",
    }
    if plan.get("divided"):
        facts["divided"] = ", ".join(
            f"{entry['shard']} into {len(entry['into'])} shards" for entry in plan["divided"]
        )
    if plan["left_out"]:
        facts["left out"] = ", ".join(plan["left_out"])
    return facts


def print_result(result: Mapping[str, Any]) -> None:
    """Print the result of a conversion, of a base or of a trained adapter."""
    facts = {"output": result.get("output") or _KEPT}
    if result.get("matrices") is not None:
        facts["matrices"] = str(result["matrices"])
    if result.get("ranks"):
        facts |= lora_facts(result["ranks"], result["max_lost"])
    shares = ("energy", "max_missed", "max_recombination_error")
    names = ("captured energy", "most energy missed", "largest recombination error")
    facts |= {
        name: f"{result[key]:.3g}"
        for key, name in zip(shares, names, strict=True)
        if result.get(key) is not None
    }
    print_facts(facts | _cost(result))


def lora_facts(ranks: Sequence[int], lost: float) -> dict[str, str]:
    """Say what a plain LoRA's ranks are, the smallest and the largest, and what it has lost."""
    smallest, largest = ranks
    return {
        "rank": str(largest) if smallest == largest else f"{smallest} to {largest}",
        "largest loss": f"{lost:.3g} of a module's update" if lost else "none, it is exact",
    }


def _cost(result: Mapping[str, Any]) -> dict[str, str]:
    facts = {}
    if result.get("seconds") is not None:
        facts["time"] = duration(result["seconds"])
    if result.get("peak_memory_bytes"):
        facts["peak memory"] = size(result["peak_memory_bytes"])
    return facts


def print_verdict(result: Mapping[str, Any]) -> None:
    """Print the verdict of a verification that a service made; its manifest is the report."""
    facts = {
        "verdict": "passed" if result["passed"] else "NOT PASSED",
        "matrices": str(result["matrices"]),
        "faults": str(result["faults"]),
    }
    if result.get("max_recombination_error") is not None:
        facts["largest recombination error"] = f"{result['max_recombination_error']:.3g}"
    if result.get("seconds") is not None:
        facts["time"] = duration(result["seconds"])
    facts["report"] = result["manifest"]
    print_facts(facts)


def print_folded(result: Mapping[str, Any]) -> None:
    """Print the result of a fold."""
    facts = {"output": result["output"] or _KEPT, "matrices": str(result["matrices"])}
    if result["replaced"]:
        facts["taken whole"] = f"{result['replaced']} tensors"
    if result["weights"]:
        share = 100 * result["equal_weights"] / result["weights"]
        facts["bit-equal to the original"] = f"{share:.4g} % of {result['weights']:,} weights"
        facts["largest ‖W − W₀‖ / ‖W₀‖"] = f"{result['max_recombination_error']:.3g}"
        facts["most that one weight is off"] = (
            f"{result['max_ulps']:,} units of the last place (many where it is near zero)"
        )
    print_facts(facts | _cost(result))


def loading_snippet(base: str, revision: str | None = None, model_class: str | None = None) -> str:
    """Say in Python how stock transformers and PEFT load the pair."""
    loader = model_class or "AutoModel"
    pinned = f', revision="{revision}"' if revision else ""
    return (
        f"from peft import PeftModel\n"
        f"from transformers import {loader}\n\n"
        f'base = {loader}.from_pretrained("{base}"{pinned})\n'
        f'model = PeftModel.from_pretrained(\n    base, "{base}"{pinned}, '
        f'subfolder="pissa_init", is_trainable=True\n)'
    )


def lora_snippet(adapter: str, base: str | None, revision: str | None, loader: str) -> str:
    """Say in Python how PEFT puts a plain LoRA, in a folder or on the Hub, on its base."""
    # Quoted as JSON: a name from a file of others must not leave its quotes.
    named = json.dumps(base or "path/to/the/original/model", ensure_ascii=False)
    at = f", revision={json.dumps(revision)}" if revision else ""
    repo, pinned = repo_and_revision(adapter)
    own = f', revision="{pinned}"' if pinned else ""
    return (
        f"from peft import PeftModel\n"
        f"from transformers import {loader}\n\n"
        f"base = {loader}.from_pretrained({named}{at})\n"
        f'model = PeftModel.from_pretrained(base, "{repo}"{own})'
    )


def repo_and_revision(ref: str) -> tuple[str, str | None]:
    """Split a result's reference into what the libraries call it; a folder has no revision."""
    if not ref.startswith("hf://"):
        return ref, None
    repo, _, revision = ref.removeprefix("hf://").partition("@")
    return repo, revision or None


def plain_snippet(model: str, revision: str | None = None, model_class: str | None = None) -> str:
    """Say in Python how transformers loads a plain model."""
    loader = model_class or "AutoModel"
    pinned = f', revision="{revision}"' if revision else ""
    return (
        f'from transformers import {loader}\n\nmodel = {loader}.from_pretrained("{model}"{pinned})'
    )


def print_jobs(jobs: Sequence[Mapping[str, Any]]) -> None:
    """Print one line a job."""
    print_table(
        ("id", "kind", "status", "phase", "matrices", "created", "model"),
        [
            (
                job["id"],
                job["kind"],
                job["status"],
                job["phase"],
                _of(job["progress"]["matrices"]),
                str(job["created_at"])[:19].replace("T", " ") + "Z",
                _asked(job["request"]),
            )
            for job in jobs
        ],
        right=(4,),
    )


def _of(counted: Mapping[str, int]) -> str:
    return f"{counted['done']}/{counted['total']}" if counted["total"] else "-"


def _asked(request: Mapping[str, Any]) -> str:
    named = (request.get(field) for field in MAIN_SOURCES)
    return str(next((ref for ref in named if ref), ""))
