"""Whether two adapters belong to one residual model, and what the original of that model is.

What a manifest says is held against the files; without one, the names that the adapters bear
must agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pissa_core.errors import AdaptersDoNotMatch, HeaderInvalid, WrongBase
from pissa_core.layout.sidefiles import INITIAL, MANIFEST
from pissa_core.lora.adapter import CONFIG, WEIGHTS, Adapter
from pissa_core.lora.finding import (
    HERE,
    Opener,
    Place,
    base_of,
    find_place,
    parent_of,
)
from pissa_core.ports import CheckpointSource
from pissa_core.refs import HubRef, LocalRef, Ref, parse_ref

_MOVED = "if the model was moved, set base_model_name_or_path in the trained adapter's config"
_SAME = 1e-9


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a pair comes from.

    Attributes:
        base: the original model as an adapter's config names it; None where nothing tells.
        revision: its commit on the Hub, where known.
        residual: the residual model's reference, where its manifest was found.
        notes: what was found, and what could not be checked, in sentences.
    """

    base: str | None
    revision: str | None
    residual: str | None
    notes: tuple[str, ...]


def trace(
    trained: Adapter,
    initial: Adapter,
    ref: Ref,
    source: CheckpointSource,
    open_ref: Opener,
    *,
    root: Path | None = HERE,
) -> Lineage:
    """Check that both adapters belong to one residual model, and find its original.

    Args:
        trained: the trained adapter.
        initial: the initial one.
        ref: where that was opened.
        source: its files.
        open_ref: opens a reference.
        root: as of `base_of`.

    Raises:
        WrongBase: if the trained adapter was trained on another model.
        AdaptersDoNotMatch: if the initial adapter is not the one its manifest lists.
    """
    own = find_place(parent_of(ref), open_ref)
    base = base_of(trained.config, root)
    named_alike = trained.base is not None and trained.base == initial.base
    if own is None or own.manifest is None or not named_alike:
        place = find_place(base, open_ref)
        if place is not None and place.manifest is not None:
            _check_trained_on(place, place.manifest, initial, source)
            return _from_manifest(place, place.manifest)
    _check_names(trained, initial, base, own)
    if own is not None and own.manifest is not None:
        _check_listed(own, own.manifest, initial, source)
        return _from_manifest(own, own.manifest)
    return _from_names(initial, find_place(base_of(initial.config, root), open_ref))


def _check_trained_on(
    place: Place, manifest: Mapping[str, Any], initial: Adapter, source: CheckpointSource
) -> None:
    listed, found = _listed(place, manifest), checksum(source, WEIGHTS)
    if listed != found:
        raise WrongBase(
            f"the trained adapter was trained on {place.source.ref}, whose initial adapter is "
            f"another than {initial.ref}: its sha256 is {listed[:16]}…, not {found[:16]}…",
            hint=f"the initial adapter of that model is in its folder {INITIAL}/",
        )
    _check_rows(place, manifest, initial)


def _check_listed(
    own: Place, manifest: Mapping[str, Any], initial: Adapter, source: CheckpointSource
) -> None:
    listed, found = _listed(own, manifest), checksum(source, WEIGHTS)
    if listed != found:
        raise AdaptersDoNotMatch(
            f"{initial.ref} is not the initial adapter that {own.source.ref} was made with: its "
            f"sha256 is {found[:16]}…, the manifest lists {listed[:16]}…",
            hint="the file was changed or replaced; take the one that was published",
        )
    _check_rows(own, manifest, initial)


def _listed(place: Place, manifest: Mapping[str, Any]) -> str:
    try:
        return str(manifest["files"][f"{INITIAL}/{WEIGHTS}"]["sha256"])
    except (KeyError, TypeError) as error:
        raise HeaderInvalid(
            f"{MANIFEST} of {place.source.ref} does not list the initial adapter"
        ) from error


def _scalings(place: Place, manifest: Mapping[str, Any]) -> list[tuple[str, float]]:
    try:
        rows = manifest.get("matrices") or ()
        return [(str(row["module"]), float(row["scaling"])) for row in rows]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise HeaderInvalid(
            f"{MANIFEST} of {place.source.ref} has a row that names no module and scaling"
        ) from error


def _check_rows(place: Place, manifest: Mapping[str, Any], initial: Adapter) -> None:
    """The file is the one listed: what is left is its config, which says the scalings."""
    for module, said in _scalings(place, manifest):
        pair = initial.pairs.get(module)
        if pair is None or abs(pair.scaling - said) > _SAME * said:
            found = "no such target" if pair is None else f"scaling {pair.scaling:.6g}"
            raise AdaptersDoNotMatch(
                f"{module} has scaling {said:.6g} in the manifest of {place.source.ref} "
                f"and {found} in the initial adapter",
                hint="its adapter_config.json was changed; take the one that was published",
            )


def _check_names(trained: Adapter, initial: Adapter, base: Ref | None, own: Place | None) -> None:
    """Without the trained adapter's base at hand its name must be the initial one's, or place."""
    if base is None or trained.base == initial.base or (own is not None and _same(base, own.ref)):
        return
    belongs = f"lies in {own.source.ref}" if own is not None else f"belongs to {initial.base}"
    raise WrongBase(
        f"the trained adapter was trained on {trained.base}, the initial adapter {belongs}",
        hint=_MOVED,
    )


def _same(one: Ref, other: Ref) -> bool:
    if isinstance(one, HubRef) and isinstance(other, HubRef):
        return (one.repo_id, one.subfolder) == (other.repo_id, other.subfolder)
    if isinstance(one, LocalRef) and isinstance(other, LocalRef):
        return Path(one.path).resolve() == Path(other.path).resolve()
    return False


def _from_manifest(place: Place, manifest: Mapping[str, Any]) -> Lineage:
    named = manifest.get("source")
    named = named if isinstance(named, dict) else {}
    text, commit = named.get("ref"), named.get("commit")
    if not isinstance(text, str) or not text or not isinstance(commit, str | None):
        raise HeaderInvalid(f"{MANIFEST} of {place.source.ref} does not name its source")
    original = LocalRef(text) if text.startswith("/") else parse_ref(text)
    name = original.repo_id if isinstance(original, HubRef) else original.path
    at = f" at commit {commit}" if commit else ""
    if isinstance(original, HubRef) and original.subfolder:
        # An adapter's config has no field for it.
        at = f", in the folder {original.subfolder} of that repo{at}"
    note = (
        f"the original base is {name}{at}, and the initial adapter is the one that was made from "
        f"it: so says the manifest of {place.source.ref}"
    )
    return Lineage(name, commit, place.source.ref, (note,))


def _from_names(initial: Adapter, place: Place | None) -> Lineage:
    """Without a manifest, the initial adapter's base is the original only if it cannot be else.

    PEFT's own way decomposes the model in memory, so the adapter names the original; a saved
    residual has its initial adapter inside, or can no longer be looked at.
    """
    unchecked = f"no {MANIFEST} was found, so the initial adapter is taken at its word"
    decomposes = str(initial.config.get("init_lora_weights")).lower().startswith("pissa")
    inside = place is not None and f"{INITIAL}/{CONFIG}" in place.source.files()
    if initial.base is None or inside or not (decomposes or place is not None):
        unknown = "what the original base is, nothing here says; the result names none"
        return Lineage(None, None, None, (unchecked, unknown))
    revision = initial.config.get("revision")
    note = f"the original base is {initial.base}, as the initial adapter names it"
    return Lineage(initial.base, revision, None, (unchecked, note))


def checksum(source: CheckpointSource, path: str) -> str:
    """Return the sha256 of a file, as the source knows it or by reading it in chunks."""
    info = source.files()[path]
    if info.sha256 is not None:
        return info.sha256
    digest = hashlib.sha256()
    for piece in source.stream(path, 0, info.size):
        digest.update(piece)
    return digest.hexdigest()
