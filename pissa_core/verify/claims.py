"""The manifest's claims held against what was found; pure functions that return faults."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from pissa_core.plan import CarriedTensor, Matrix, row_of
from pissa_core.report.figures import energy_share
from pissa_core.verify.case import Fault
from pissa_core.verify.matrix import UNIT

TOP_LEVEL = {"schema", "kind", "source", "config", "versions", "files", "matrices", "totals"}
_NOTES = "notes"  # there where the plan had some
_FIGURES = {"sigma", "energy", "missed", "recombination_error", "method"}
_STATIC = ("module", "tensor", "shard", "shape", "rank", "scaling")


def shape_faults(manifest: Mapping[str, Any]) -> Iterator[Fault]:
    """Find what a manifest lacks, or has that no manifest of a conversion has."""
    for name in sorted(TOP_LEVEL ^ (manifest.keys() - {_NOTES})):
        what = "is missing" if name in TOP_LEVEL else "is not known"
        yield Fault("manifest", name, f"the field {what}")
    if manifest.get("schema") != 1 or manifest.get("kind") != "base-to-pissa":
        yield Fault(
            "manifest",
            "kind",
            f"schema {manifest.get('schema')!r}, kind {manifest.get('kind')!r}: the output of a "
            "base-to-pissa conversion is wanted",
        )
    if _NOTES in manifest and not _are_sentences(manifest[_NOTES]):
        yield Fault("manifest", _NOTES, "it is no list of sentences")
    versions = manifest.get("versions")
    if not isinstance(versions, dict) or "pissa-service" not in versions:
        yield Fault("manifest", "versions", "it does not say what made it")
    for row in _rows(manifest):
        if missing := sorted((_FIGURES | set(_STATIC)) - row.keys()):
            yield Fault("manifest", str(row.get("module")), f"its row has no {missing[0]}")
    kinds = {frozenset(row) for row in _rows(manifest)}
    if len(kinds) > 1:
        yield Fault("manifest", "matrices", "not all rows have the same fields")


def _are_sentences(notes: object) -> bool:
    return isinstance(notes, list) and bool(notes) and all(isinstance(note, str) for note in notes)


def row_faults(manifest: Mapping[str, Any], matrices: Iterable[Matrix]) -> Iterator[Fault]:
    """Hold the rows against the targets that the adapter itself has."""
    rows = {str(row.get("module")): row for row in _rows(manifest)}
    wanted = {matrix.module: row_of(matrix) for matrix in matrices}
    for name in sorted(rows.keys() ^ wanted.keys()):
        what = "the adapter has nothing for it" if name in rows else "the manifest has no row of it"
        yield Fault("manifest", name, what)
    for name in rows.keys() & wanted.keys():
        for field in _STATIC:
            if rows[name].get(field) != wanted[name][field]:
                yield Fault(
                    "manifest",
                    name,
                    f"its row says {field} {rows[name].get(field)!r}, and it is "
                    f"{wanted[name][field]!r}",
                )


def total_faults(
    manifest: Mapping[str, Any], matrices: Sequence[Matrix], carried: Sequence[CarriedTensor]
) -> Iterator[Fault]:
    """Sum the rows up again; sums are exact, so every digit must be the same."""
    rows = _rows(manifest)
    parameters = sum(m.rank * sum(m.shape) for m in matrices)
    parameters += sum(math.prod(tensor.shape) for tensor in carried)
    try:
        totals = {
            "matrices": len(rows),
            "trainable_parameters": parameters,
            "energy": energy_share(rows),
            "max_missed": max((float(row["missed"]) for row in rows), default=0.0),
            "max_recombination_error": max(
                (float(row["recombination_error"]) for row in rows), default=0.0
            ),
        }
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError):
        yield Fault("manifest", "matrices", "the rows hold figures that are none")
        return
    stated = manifest.get("totals")
    for name in totals:
        said = stated.get(name) if isinstance(stated, dict) else None
        if said != totals[name]:
            yield Fault(
                "manifest",
                f"totals.{name}",
                f"it says {said!r}, the rows add up to {totals[name]!r}",
            )
    if isinstance(stated, dict) and (unknown := sorted(stated.keys() - totals.keys())):
        yield Fault("manifest", f"totals.{unknown[0]}", "the field is not known")


def file_faults(
    manifest: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]
) -> Iterator[Fault]:
    """Hold the listed checksums and sizes against those of the files."""
    listed = manifest.get("files")
    listed = listed if isinstance(listed, dict) else {}
    for path in sorted(listed.keys() - found.keys()):
        yield Fault("files", path, "the manifest lists it, and it is not there")
    for path in sorted(found.keys() - listed.keys()):
        yield Fault("files", path, "it is there, and the manifest does not list it")
    for path in sorted(found.keys() & listed.keys()):
        if listed[path] != dict(found[path]):
            said = listed[path].get("sha256") if isinstance(listed[path], dict) else listed[path]
            yield Fault(
                "files",
                path,
                f"its sha256 is {found[path]['sha256'][:16]}… ({found[path]['size']:,} bytes), the "
                f"manifest says {str(said)[:16]}…",
            )


def figure_faults(
    manifest: Mapping[str, Any], measured: Iterable[Mapping[str, Any]]
) -> Iterator[Fault]:
    """Hold the stated figures against those that were measured anew.

    The singular values come back from the factors, which were rounded to the adapter's dtype (in
    ``peft`` rounding to the weights'): 4 u each way, and 1e-4 for vectors that are orthonormal only
    so far. The error of recombination is a sum over all entries and agrees to 1e-3, but for what
    float32 adds to it, 2^-24 (r + 8).
    """
    rows = {str(row.get("module")): row for row in _rows(manifest)}
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    config = manifest.get("config")
    config = config if isinstance(config, dict) else {}
    u = UNIT[dtypes.get(str(config.get("adapter_dtype")), torch.float32)]
    if config.get("rounding") == "peft":
        u = UNIT[torch.bfloat16]
    for row in measured:
        stated = rows.get(row["module"])
        if stated is not None:
            yield from _differing(row, stated, 4 * u + 1e-4)


def _differing(row: Mapping[str, Any], stated: Mapping[str, Any], share: float) -> Iterator[Fault]:
    error = row["recombination_error"]
    if error is None:
        yield Fault("figures", row["module"], "it holds numbers that are not finite")
        return
    slack = {
        "energy": 2 * share * row["energy"] + 1e-12,
        "recombination_error": 1e-3 * error + 2.0**-24 * (row["rank"] + 8),
    }
    for name, allowed in slack.items():
        said = stated.get(name)
        if not isinstance(said, int | float) or not abs(said - row[name]) <= allowed:
            yield Fault(
                "figures",
                row["module"],
                f"the manifest says {name} {said}, and it is {row[name]:.6g}",
            )
    said = stated.get("sigma")
    pairs = zip(said, row["sigma"], strict=False) if isinstance(said, list) else ()
    close = [
        abs(mine - theirs) <= share * theirs + 1e-12 for mine, theirs in pairs if _number(mine)
    ]
    if len(close) != len(row["sigma"]) or not all(close):
        yield Fault("figures", row["module"], "its singular values are not those of the adapter")
    for name in ("missed", "energy"):
        value = stated.get(name)
        if not _number(value) or not 0 <= value <= 1:  # type: ignore[operator]
            yield Fault("figures", row["module"], f"{name} is {value!r}, which is no share")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _rows(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rows = manifest.get("matrices")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
