"""Whether an adapter belongs to a residual model, and what the residual says it was made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pissa_core.errors import (
    AdaptersDoNotMatch,
    HeaderInvalid,
    PissaError,
    WrongBase,
)
from pissa_core.fold.adapter import CONFIG, WEIGHTS, Adapter, checksum, decomposes
from pissa_core.layout.jsonfile import (
    LARGEST_CONFIG,
    LARGEST_MANIFEST,
    MOST_IN_A_MANIFEST,
    read_object,
)
from pissa_core.layout.sidefiles import INITIAL, MANIFEST
from pissa_core.plan import Matrix
from pissa_core.ports import CheckpointSource
from pissa_core.refs import HubRef, Ref, parse_ref

RESIDUAL_KIND = "base-to-pissa"

Open = Callable[[Ref], CheckpointSource]
"""Opens a reference that a file names; raises PissaError if that is not possible here."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """What is known of an adapter and its base.

    Attributes:
        sha256: checksum of the adapter's weights.
        initial: it is the adapter that the residual was made with.
        rows: rows of the residual's manifest by module; None without a manifest.
        original: reference of the model that the residual was made from.
        listed: path → sha256 of every file of weights in the residual's manifest; empty without.
    """

    sha256: str
    initial: bool
    rows: Mapping[str, Mapping[str, Any]] | None
    original: str | None
    listed: Mapping[str, str]


def read_manifest(source: CheckpointSource) -> dict[str, Any] | None:
    """Return the manifest at the root of `source`, or None if it has none.

    Raises:
        HeaderInvalid: if it is no manifest.
    """
    if MANIFEST not in source.files():
        return None
    try:
        manifest = read_object(source, MANIFEST, LARGEST_MANIFEST, most=MOST_IN_A_MANIFEST)
        shaped = isinstance(manifest["files"], dict) and isinstance(manifest["matrices"], list)
        if not shaped or not isinstance(manifest["source"]["ref"], str):
            raise ValueError("it lacks files, matrices or source")
        {row["module"]: (row["rank"] + 0, row["scaling"] + 0) for row in manifest["matrices"]}
        {path: info["sha256"] for path, info in manifest["files"].items()}
    except (HeaderInvalid, ValueError, KeyError, TypeError) as error:
        raise HeaderInvalid(
            f"{MANIFEST} of {source.ref} is damaged ({type(error).__name__}: {str(error)[:200]})",
            hint="`pissa verify` tells what else is; without the file the model is taken as it is",
        ) from error
    return dict(manifest)


def trace(residual: CheckpointSource, adapter: Adapter, open_other: Open) -> Lineage:
    """Follow the names that adapter and residual hold, and refuse a pair that does not belong.

    Raises:
        WrongBase: the adapter was trained on another base, or the model is no residual.
        AdaptersDoNotMatch: PEFT, loading the adapter, would have decomposed the residual again.
    """
    manifest = read_manifest(residual)
    kind = (manifest or {}).get("kind", RESIDUAL_KIND)
    if kind != RESIDUAL_KIND:
        raise WrongBase(
            f"{residual.ref} is no residual model: its manifest says that it is the result of "
            f"{str(kind)[:40]}",
            hint="name the output of a base-to-pissa conversion",
        )
    sha256 = checksum(adapter.source, WEIGHTS)
    listed = (manifest or {}).get("files", {}).get(f"{INITIAL}/{WEIGHTS}", {})
    initial = listed.get("sha256") == sha256
    if decomposes(adapter.config):
        raise AdaptersDoNotMatch(
            f"the adapter's config says init_lora_weights="
            f"{adapter.config['init_lora_weights']!r}: PEFT would decompose the residual once "
            "more, so what was trained with it was trained on other weights",
            hint=f'the adapters of a residual say "init_lora_weights": true, as in {INITIAL}/',
        )
    if not initial and not _leads_here(adapter.config, residual, manifest, open_other):
        raise WrongBase(
            f"the adapter was trained on {_named(adapter.config)}, and nothing says that it is "
            f"{residual.ref}",
            hint="give the residual that the adapter names; if it is this one under another name, "
            f"correct base_model_name_or_path in {CONFIG}",
        )
    return Lineage(
        sha256=sha256,
        initial=initial,
        rows=None if manifest is None else {row["module"]: row for row in manifest["matrices"]},
        original=None if manifest is None else manifest["source"]["ref"],
        listed={} if manifest is None else _weights(manifest),
    )


def check_is_listed(residual: CheckpointSource, path: str, listed: Mapping[str, str]) -> None:
    """Refuse a shard that is not the one the residual's manifest lists.

    The file is read for its checksum where the source does not know it.

    Raises:
        WrongBase: what the adapter belongs to is the residual as it was made.
    """
    if not listed:
        return
    said = listed.get(path)
    found = None if said is None else checksum(residual, path)
    if said is None or found != said:
        differs = (
            "is not listed in its manifest"
            if said is None
            else f"has the sha256 {str(found)[:16]}…, and its manifest lists {said[:16]}…"
        )
        raise WrongBase(
            f"{path} of {residual.ref} {differs}: it is not the residual that was made",
            hint="download or make the residual again; `pissa verify` tells what else differs",
        )


def check_same_targets(matrices: Iterable[Matrix], rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse an adapter that adapts other modules than the residual lacks a part of.

    Raises:
        AdaptersDoNotMatch: naming the first module that differs, and how.
    """
    found = {matrix.module: matrix for matrix in matrices}
    for name in sorted(rows.keys() - found.keys()):
        raise AdaptersDoNotMatch(
            f"{name} is a residual, and the adapter has nothing for it",
            hint=f"only adapters trained from {INITIAL}/ complete this model",
        )
    for name in sorted(found.keys() - rows.keys()):
        raise AdaptersDoNotMatch(
            f"the adapter changes {name}, which the manifest does not list as a residual",
            hint=f"only adapters trained from {INITIAL}/ belong to this model",
        )
    for name, matrix in found.items():
        row = rows[name]
        same = matrix.rank == row["rank"]
        if not (same and math.isclose(matrix.scaling, row["scaling"], rel_tol=1e-6)):
            raise AdaptersDoNotMatch(
                f"{name} has rank {matrix.rank} and scaling {matrix.scaling:g} in the adapter, "
                f"rank {row['rank']} and scaling {row['scaling']:g} in the residual's manifest",
                hint=f"only adapters trained from {INITIAL}/ belong to this model",
            )


def _named(config: Mapping[str, Any]) -> str:
    revision = config.get("revision")
    return f"{config.get('base_model_name_or_path')}" + (f"@{revision}" if revision else "")


def _leads_here(
    config: Mapping[str, Any],
    residual: CheckpointSource,
    manifest: Mapping[str, Any] | None,
    open_other: Open,
) -> bool:
    """Whether the base that an adapter names is this residual, perhaps under another name."""
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not name:
        return True
    if not isinstance(name, str):
        return False
    return (
        _is_its_name(name, revision, residual)
        or (name, revision) == _knows_itself_as(residual)
        or (manifest is not None and _is_a_copy(residual, name, revision, manifest, open_other))
    )


def _is_its_name(name: str, revision: object, residual: CheckpointSource) -> bool:
    root = residual.local_root()
    if root is not None:
        return Path(name).expanduser().resolve() == root
    ref = parse_ref(residual.ref)
    same = isinstance(ref, HubRef) and ref.repo_id == name and ref.subfolder is None
    return same and revision in (None, residual.commit)


def _knows_itself_as(residual: CheckpointSource) -> tuple[object, object]:
    """Return the name and revision by which the residual's own initial adapter calls it."""
    path = f"{INITIAL}/{CONFIG}"
    if path not in residual.files():
        return (None, None)
    try:
        config = read_object(residual, path, LARGEST_CONFIG)
        return config["base_model_name_or_path"], config.get("revision")
    except (HeaderInvalid, KeyError):
        return (None, None)


def _is_a_copy(
    residual: CheckpointSource,
    name: str,
    revision: object,
    manifest: Mapping[str, Any],
    open_other: Open,
) -> bool:
    """Whether what lies under `name` has a manifest that lists the same weights.

    Raises:
        AccessError: if that cannot be asked now.
    """
    try:
        at = f"@{quote(revision, safe='')}" if isinstance(revision, str) and revision else ""
        other = read_manifest(open_other(parse_ref(f"{name}{at}")))
    except PissaError as error:
        if error.retryable:  # what cannot be asked now is neither a copy nor none
            raise type(error)(
                f"whether {name} is a copy of {residual.ref} cannot be asked now: {error.message}",
                hint="run again once the Hub answers, or give the residual under the name that "
                "the adapter's config has for it",
            ) from error
        return False
    return other is not None and _weights(other) == _weights(manifest)


def _weights(manifest: Mapping[str, Any]) -> dict[str, str]:
    return {
        path: info["sha256"]
        for path, info in manifest["files"].items()
        if path.endswith(".safetensors")
    }
