"""What a converted adapter holds besides its weights: config, card, manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pissa_core.layout.sidefiles import MANIFEST
from pissa_core.lora.adapter import CONFIG
from pissa_core.lora.card import card
from pissa_core.lora.form import adapter_config
from pissa_core.lora.plan import LoraPlan
from pissa_core.ports import CheckpointSource, FileInfo, Publication, Seal
from pissa_core.report.manifest import SCHEMA, canonical_json, versions

KIND = "pissa-to-lora"


@dataclass(frozen=True, slots=True)
class _Closing:
    """Writes the last files, which state the checksums of all others."""

    plan: LoraPlan
    rows: tuple[Mapping[str, Any], ...]
    config: Mapping[str, Any]

    def __call__(self, files: Mapping[str, FileInfo]) -> dict[str, bytes]:
        readme = card(self.plan, self.rows, self.config)
        info = FileInfo(len(readme), hashlib.sha256(readme).hexdigest())
        listed = {**files, "README.md": info}
        return {"README.md": readme, MANIFEST: manifest(self.plan, self.rows, listed)}


def publication(plan: LoraPlan, trained: CheckpointSource, seal: Seal) -> Publication:
    """Say what becomes visible: the sealed weights, the config, the card and the manifest."""
    config = adapter_config(plan, {row["module"]: row["rank"] for row in seal.rows})
    text = json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"
    return Publication(
        source=trained,
        shards=(seal,),
        copies=(),
        streams={CONFIG: lambda: [text]},
        closing=_Closing(plan, seal.rows, config),
        marker=MANIFEST,
    )


def manifest(
    plan: LoraPlan, rows: tuple[Mapping[str, Any], ...], files: Mapping[str, FileInfo]
) -> bytes:
    """Return the manifest; `files` are all other files of the output, with their sha256."""
    content = {
        "schema": SCHEMA,
        "kind": KIND,
        "source": {"ref": plan.source, "commit": plan.commit},
        "config": dict(plan.config),
        "versions": versions(),
        "files": {path: {"sha256": info.sha256, "size": info.size} for path, info in files.items()},
        "lineage": lineage(plan),
        "matrices": [dict(row) for row in rows],
        "totals": totals(plan, rows),
    }
    return canonical_json(content)


def lineage(plan: LoraPlan) -> dict[str, Any]:
    """Return what the result was made of: both adapters, the residual model, the original."""
    return {
        "trained": {"ref": plan.source, "commit": plan.commit},
        "initial": {"ref": plan.initial, "commit": plan.initial_commit},
        "residual": None if plan.residual is None else {"ref": plan.residual},
        "original": {"name": plan.base, "commit": plan.base_revision},
        "carried": [tensor.name for tensor in plan.carried],
        "left_out": list(plan.left_out),
        "notes": list(plan.notes),
    }


def totals(plan: LoraPlan, rows: tuple[Mapping[str, Any], ...]) -> dict[str, Any]:
    """Sum up the rows: ranks, parameters, and the largest share of an update that was lost."""
    sides = {update.module: sum(update.trained.shape) for update in plan.updates}
    return {
        "matrices": len(rows),
        "parameters": sum(row["rank"] * sides[row["module"]] for row in rows),
        "smallest_rank": min(row["rank"] for row in rows),
        "largest_rank": max(row["rank"] for row in rows),
        "max_lost": max(row["lost"] for row in rows),
    }
