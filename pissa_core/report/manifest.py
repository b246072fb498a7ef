"""pissa_manifest.json: source, config, versions, checksums and one row a matrix."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from pissa_core.plan import Plan
from pissa_core.ports import FileInfo
from pissa_core.report.figures import Row, in_plan_order, totals

SCHEMA = 1
KIND = "base-to-pissa"

# What decides about bytes: our arithmetic and its library, the targets' semantics, the card.
_DISTRIBUTIONS = ("pissa-service", "torch", "peft", "transformers", "huggingface_hub")


def manifest(plan: Plan, rows: Sequence[Row], files: Mapping[str, FileInfo]) -> bytes:
    """Return the manifest; `files` are all other files of the output, with their sha256."""
    content = {
        "schema": SCHEMA,
        "kind": KIND,
        "source": {"ref": plan.source, "commit": plan.commit},
        "config": plan.config,
        "versions": versions(),
        "files": {path: {"sha256": info.sha256, "size": info.size} for path, info in files.items()},
        "matrices": [dict(row) for row in in_plan_order(plan, rows)],
        "totals": totals(plan, rows).as_dict(),
    }
    return canonical_json(content | ({"notes": list(plan.notes)} if plan.notes else {}))


def canonical_json(content: Any) -> bytes:
    """Serialise so that equal content gives equal bytes: sorted keys, no spaces, ASCII.

    Raises:
        ValueError: if a number is NaN or infinite, which JSON does not have.
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode() + b"\n"


def versions() -> dict[str, str]:
    """Return the versions of the packages that influence the output's bytes."""
    return {name: version(name) for name in _DISTRIBUTIONS}
