"""Rows of a manifest, put in order, grouped by kind of module and summed up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pissa_core.plan import Plan

Row = Mapping[str, Any]
"""One matrix, as the manifest holds it: plain JSON values."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Figures of the whole model.

    Attributes:
        energy: Σσ² of all matrices over the sum of their squared Frobenius norms; None where
            every target is zero.
    """

    matrices: int
    trainable_parameters: int
    energy: float | None
    max_missed: float
    max_recombination_error: float

    def as_dict(self) -> dict[str, Any]:
        """Return the totals as the manifest and the job's result show them."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a matrix sits: its kind (``self_attn.q_proj``) and its layer's number."""

    kind: str
    layer: int


def in_plan_order(plan: Plan, rows: Sequence[Row]) -> list[Row]:
    """Sort rows as the plan lists their tensors, whatever the order they were done in."""
    order = {matrix.tensor: number for number, matrix in enumerate(plan.matrices)}
    return sorted(rows, key=lambda row: order[row["tensor"]])


def totals(plan: Plan, rows: Sequence[Row]) -> Totals:
    """Sum up the rows; sums are exact (`math.fsum`), so their order does not matter."""
    return Totals(
        matrices=len(rows),
        trainable_parameters=plan.trainable_parameters,
        energy=energy_share(rows),
        max_missed=max((float(row["missed"]) for row in rows), default=0.0),
        max_recombination_error=max(
            (float(row["recombination_error"]) for row in rows), default=0.0
        ),
    )


def energy_share(rows: Sequence[Row]) -> float | None:
    """Return Σσ² / Σ‖W‖_F² over several matrices; ‖W‖_F² is Σσ² / energy of its row."""
    captured, norms = [], []
    for row in rows:
        if row["energy"] > 0:
            square = math.fsum(sigma * sigma for sigma in row["sigma"])
            captured.append(square)
            norms.append(square / row["energy"])
    total = math.fsum(norms)
    return math.fsum(captured) / total if total > 0 and math.isfinite(total) else None


def places(rows: Sequence[Row]) -> list[Place]:
    """Tell kind and layer of each row.

    The layer is the first number in the module's path, as in PEFT. The kind is the rest without
    its numbers, shortened to the ending that tells it from the other kinds.
    """
    split = [_split(row["module"]) for row in rows]
    short = _shortest_endings({kind for kind, _ in split})
    return [Place(short[kind], layer) for kind, layer in split]


def by_kind(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows by kind, kinds in order of appearance."""
    groups: dict[str, list[Row]] = {}
    for row, place in zip(rows, places(rows), strict=True):
        groups.setdefault(place.kind, []).append(row)
    return groups


def _split(module: str) -> tuple[str, int]:
    parts = module.split(".")
    layer = next((int(part) for part in parts if part.isdecimal()), 0)
    return ".".join(part for part in parts if not part.isdecimal()), layer


def _shortest_endings(kinds: set[str]) -> dict[str, str]:
    shared = Counter(ending for kind in kinds for ending in _endings(kind))
    return {
        kind: next((ending for ending in _endings(kind) if shared[ending] == 1), kind)
        for kind in kinds
    }


def _endings(kind: str) -> list[str]:
    """Return the endings of a path, shortest first."""
    parts = kind.split(".")
    return [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
