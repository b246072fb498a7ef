"""What a folded model says about itself: manifest and card, as pure functions of the plan."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import Any

from huggingface_hub.repocard_data import ModelCardData

from pissa_core.layout.sidefiles import CARD, MANIFEST, read_card
from pissa_core.plan import Fold, Plan
from pissa_core.ports import CheckpointSink, CheckpointSource, FileInfo, Publication, Seal
from pissa_core.refs import HubRef, parse_ref
from pissa_core.report.card import ORIGINAL_CARD, left_out_note
from pissa_core.report.figures import Row, in_plan_order
from pissa_core.report.manifest import SCHEMA, canonical_json, versions
from pissa_core.report.metadata import kept_metadata, make_card, split_card

_OWN_TAGS = frozenset({"pissa", "peft", "lora", "residual"})


def folded_totals(plan: Plan, rows: Sequence[Row]) -> dict[str, Any]:
    """Sum up the rows of a fold; what nothing was held against is None."""
    compared = [row for row in rows if "weights" in row]
    every = bool(rows) and len(compared) == len(rows)
    return {
        "matrices": len(rows),
        "replaced": len(plan.fold.replaced) if plan.fold else 0,
        "energy": None,
        "max_missed": None,
        "max_recombination_error": _largest(compared, "recombination_error") if every else None,
        "max_update": _largest(rows, "update"),
        "weights": sum(row["weights"] for row in compared) if every else None,
        "equal_weights": sum(row["equal_weights"] for row in compared) if every else None,
        "max_ulps": _largest(compared, "max_ulps") if every else None,
    }


def _largest(rows: Sequence[Row], name: str) -> Any:
    return max((row[name] for row in rows), default=0)


def folded_publication(
    plan: Plan, source: CheckpointSource, sink: CheckpointSink, seals: tuple[Seal, ...]
) -> Publication:
    """Say what becomes visible: sealed shards, files copied, card and manifest made last."""
    rows = tuple(row for seal in seals for row in seal.rows)
    streams = {}
    if plan.index is not None and plan.new_index is not None:
        streams[plan.index] = partial(iter, [plan.new_index.encode()])
    return Publication(
        source=source,
        shards=seals,
        copies=plan.copied,
        streams=streams,
        closing=_Closing(plan, rows, source, sink),
        marker=MANIFEST,
    )


@dataclass(frozen=True, slots=True)
class _Closing:
    """Writes the last files, which state the checksums of all others."""

    plan: Plan
    rows: tuple[Row, ...]
    source: CheckpointSource
    sink: CheckpointSink

    def __call__(self, files: Mapping[str, FileInfo]) -> dict[str, bytes]:
        before = read_card(self.source)
        readme = folded_card(self.plan, self.rows, before)
        info = FileInfo(len(readme), hashlib.sha256(readme).hexdigest())
        return {
            CARD: readme,
            MANIFEST: folded_manifest(self.plan, self.rows, {**files, CARD: info}),
        }


def folded_manifest(plan: Plan, rows: Sequence[Row], files: Mapping[str, FileInfo]) -> bytes:
    """Return the manifest; `files` are all other files of the output, with their sha256."""
    fold = _fold_of(plan)
    original = {"ref": fold.original, "commit": fold.original_commit}
    content = {
        "schema": SCHEMA,
        "kind": plan.kind,
        "source": {"ref": plan.source, "commit": plan.commit},
        "adapter": {
            "ref": fold.adapter,
            "commit": fold.adapter_commit,
            "sha256": fold.adapter_sha256,
            "initial": fold.initial,
        },
        "original": original if fold.original else None,
        "config": plan.config,
        "versions": versions(),
        "files": {path: {"sha256": info.sha256, "size": info.size} for path, info in files.items()},
        "matrices": [dict(row) for row in in_plan_order(plan, rows)],
        "replaced": sorted(tensor.tensor for tensor in fold.replaced),
        "totals": folded_totals(plan, rows),
    }
    return canonical_json(content)


def folded_card(plan: Plan, rows: Sequence[Row], residual_card: str) -> bytes:
    """Return the card: what this model is, and the original's own card, from below the residual's.

    Args:
        plan: what was done.
        rows: one row a matrix.
        residual_card: README.md of the residual, metadata included.
    """
    metadata, body = split_card(residual_card)
    _, found, original_body = body.partition(ORIGINAL_CARD)
    sections = [_opening(plan), _figures(plan, rows), _lineage(plan)]
    if found and original_body.strip():
        sections.append(f"---\n\n{ORIGINAL_CARD}\n\n{original_body.strip()}")
    return make_card(folded_metadata(plan, metadata), sections)


def _fold_of(plan: Plan) -> Fold:
    if plan.fold is None:
        raise ValueError("this plan folds nothing")
    return plan.fold


def _opening(plan: Plan) -> str:
    name = _repo(plan.source) or PurePath(plan.source).name or "A model"
    if _fold_of(plan).initial:
        return (
            f"# The original of {name}\n\nA plain model: the residual and its initial PiSSA "
            "adapter put together again, W = R + scaling · B · A, rounded once. It is the model "
            "that the residual was made from, up to that rounding."
        )
    return (
        f"# {name}, with its trained adapter merged in\n\nA plain model: a PiSSA residual and an "
        "adapter trained on it, merged as W = R + scaling · B · A in float32 and rounded once. "
        "It loads without PEFT."
    )


def _figures(plan: Plan, rows: Sequence[Row]) -> str:
    figures = folded_totals(plan, rows)
    lines = [f"* {figures['matrices']} matrices were merged."]
    if figures["replaced"]:
        lines.append(f"* {figures['replaced']} tensors were taken from the adapter as a whole.")
    if figures["weights"]:
        share = figures["equal_weights"] / figures["weights"]
        lines.append(
            f"* Of {figures['weights']:,} weights in them {figures['equal_weights']:,} "
            f"({100 * share:.4g} %) are the original's to the bit; the largest difference is "
            f"{figures['max_ulps']:,} units of the last place, and the largest "
            f"‖W − W₀‖ / ‖W₀‖ of a matrix is {figures['max_recombination_error']:.1e}."
        )
    lines.append("* Each matrix has its own row in `pissa_manifest.json`.")
    return "## What was measured\n\n" + "\n".join(lines)


def _lineage(plan: Plan) -> str:
    fold = _fold_of(plan)
    named = {"residual": (plan.source, plan.commit), "adapter": (fold.adapter, fold.adapter_commit)}
    lines = []
    for role, (ref, commit) in named.items():
        repo = _repo(ref)
        where = f"[{repo}](https://huggingface.co/{repo})" if repo else "a local folder"
        lines.append(f"* {role}: {where}" + (f" at commit `{commit}`" if commit else ""))
    checksum = f"* the adapter's weights have the sha256 `{fold.adapter_sha256}`"
    note = f"\n\n{left_out_note(plan)}" if plan.card_without else ""
    return "## Where it comes from\n\n" + "\n".join([*lines, checksum]) + note


def folded_metadata(plan: Plan, before: Mapping[str, Any]) -> ModelCardData:
    """Return the YAML block: ours, and of the residual's what still holds."""
    kept, tags = kept_metadata(before, plan.card_without)
    base = None if "base_model" in plan.card_without else before.get("base_model")
    base = base if isinstance(base, str) else None
    base = base or _repo(plan.source)
    if base:
        kept |= {"base_model": base, "base_model_relation": "finetune"}
    tags = [tag for tag in tags if tag not in _OWN_TAGS]
    return ModelCardData(library_name="transformers", tags=[*tags, "pissa-merged"], **kept)


def _repo(ref: str) -> str | None:
    if not ref.startswith("hf://"):
        return None
    parsed = parse_ref(ref)
    return parsed.repo_id if isinstance(parsed, HubRef) else None
