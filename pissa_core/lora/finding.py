"""Where an adapter's initial one, its residual model and that model's manifest lie.

The trained adapter names its base; that is the residual model, beside which the initial adapter
and the manifest lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pissa_core.errors import (
    AccessError,
    HeaderInvalid,
    HubUnavailable,
    InvalidReference,
    OutsideLocalRoot,
    WrongBase,
)
from pissa_core.layout.jsonfile import LARGEST_MANIFEST, MOST_IN_A_MANIFEST, read_object
from pissa_core.layout.sidefiles import INITIAL, MANIFEST
from pissa_core.lora.adapter import CONFIG, read_config
from pissa_core.ports import CheckpointSource
from pissa_core.refs import HubRef, LocalRef, Ref, parse_ref

_HINT = "name the initial adapter (--initial, in REST initial)"

HERE = Path()
"""The working directory, where a command's relative paths start."""

Opener = Callable[[Ref], CheckpointSource]


@dataclass(frozen=True, slots=True)
class Place:
    """A model that an adapter names or lies in; `manifest` is ours, if it is an output of ours."""

    ref: Ref
    source: CheckpointSource
    manifest: Mapping[str, Any] | None


def find_initial(
    trained: Mapping[str, Any], given: Ref | None, open_ref: Opener, *, root: Path | None = HERE
) -> tuple[Ref, CheckpointSource]:
    """Open the initial adapter: the one given, or the one beside the trained adapter's base.

    Args:
        trained: the trained adapter's config.
        given: what was asked for; a residual model stands for the adapter in it.
        open_ref: opens a reference.
        root: as of `base_of`.

    Raises:
        WrongBase: if none was given and the base leads to none.
    """
    if given is not None:
        source = open_ref(given)
        if CONFIG not in source.files() and f"{INITIAL}/{CONFIG}" in source.files():
            given = _below(given)
            source = open_ref(given)
        return given, source
    residual = base_of(trained, root)
    if residual is None:
        raise WrongBase("the trained adapter does not say what base it was trained on", hint=_HINT)
    try:
        ref = _below(residual)
        source = open_ref(ref)
        read_config(source)
    except (AccessError, OutsideLocalRoot) as error:
        if error.retryable:
            raise
        raise WrongBase(
            f"the base of the trained adapter is {residual}, and beside it there is no initial "
            f"adapter: {error.message}",
            hint=_HINT,
        ) from error
    return ref, source


def find_place(ref: Ref | None, open_ref: Opener) -> Place | None:
    """Open a model and read its manifest; None if there is nothing, or no Hub, to be reached."""
    if ref is None:
        return None
    try:
        source = open_ref(ref)
        return Place(ref, source, _manifest_of(source))
    except (AccessError, OutsideLocalRoot) as error:
        # A machine without a way to the Hub can convert what it has; a Hub that asks to wait will
        # answer.
        if error.retryable and not isinstance(error, HubUnavailable):
            raise
        return None


def base_of(config: Mapping[str, Any], root: Path | None = HERE) -> Ref | None:
    """Read what an adapter names as its base: a path, or a repo and perhaps its revision.

    Args:
        config: the adapter's.
        root: where relative paths start; a repo's name that is a folder there means that folder.
            None: no folder is looked for.

    Raises:
        WrongBase: if it is neither.
    """
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        return None
    if name.startswith("/"):
        return LocalRef(name)
    if root is not None and _is_folder(root, name):
        return LocalRef(str((root / name).absolute()))
    try:
        ref = parse_ref(name)
    except InvalidReference as error:
        raise WrongBase(
            f"the adapter's base {name!r} is neither a folder here nor a repo", hint=_HINT
        ) from error
    if isinstance(ref, HubRef) and isinstance(revision, str) and revision:
        return HubRef(ref.repo_id, revision, ref.subfolder)
    return ref


def _is_folder(root: Path, name: str) -> bool:
    try:
        return (root / name).is_dir()
    except (OSError, ValueError):  # a name longer than any, or with a NUL in it
        return False


def parent_of(initial: Ref) -> Ref | None:
    """Return the model that an initial adapter lies in, if its folder's name says so.

    A folder that was renamed lies in one if there is a manifest beside it.
    """
    if isinstance(initial, LocalRef):
        path = Path(initial.path).expanduser()
        inside = path.name == INITIAL or (path.parent / MANIFEST).is_file()
        return LocalRef(str(path.parent)) if inside else None
    if initial.subfolder is None or PurePosixPath(initial.subfolder).name != INITIAL:
        return None
    above = str(PurePosixPath(initial.subfolder).parent)
    return HubRef(initial.repo_id, initial.revision, None if above == "." else above)


def _below(residual: Ref) -> Ref:
    if isinstance(residual, LocalRef):
        return LocalRef(str(Path(residual.path) / INITIAL))
    inside = "/".join(filter(None, (residual.subfolder, INITIAL)))
    return HubRef(residual.repo_id, residual.revision, inside)


def _manifest_of(source: CheckpointSource) -> Mapping[str, Any] | None:
    if MANIFEST not in source.files():
        return None
    try:
        manifest = read_object(source, MANIFEST, LARGEST_MANIFEST, most=MOST_IN_A_MANIFEST)
    except HeaderInvalid:
        return None
    return manifest if manifest.get("kind") == "base-to-pissa" else None
