"""References to models: one grammar for command line, REST and manifest.

::

    name  org/name  org/name@revision                    on the Hub
    hf://org/name[@revision][/subfolder]                 on the Hub, perhaps a folder of it
    /path  ./path  ../path  ~/path  file:path            a local folder

A revision that holds a slash is percent-encoded (``refs%2Fpr%2F1``). Importing this module
loads no torch.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote

from pissa_core.errors import InvalidReference, OutsideLocalRoot

_LOCAL_PREFIXES = ("/", "./", "../", "~", "file:")
_LONGEST = 4096
_RESERVED_BRANCHES = ("refs/", "pissa-staging-")
_COMMIT = re.compile("[0-9a-f]{40}")
_NOT_IN_BRANCH = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|@\{")


@dataclass(frozen=True, slots=True)
class HubRef:
    """A model repo on the Hub, at a revision (None: the default branch), perhaps a subfolder."""

    repo_id: str
    revision: str | None = None
    subfolder: str | None = None

    def __str__(self) -> str:
        revision = f"@{quote(self.revision, safe='')}" if self.revision else ""
        subfolder = f"/{self.subfolder}" if self.subfolder else ""
        return f"hf://{self.repo_id}{revision}{subfolder}"


@dataclass(frozen=True, slots=True)
class LocalRef:
    """A local folder, as written; `resolve_local` makes it absolute."""

    path: str

    def __str__(self) -> str:
        return self.path


Ref = HubRef | LocalRef


def parse_ref(text: str) -> Ref:
    """Read a reference.

    Raises:
        InvalidReference: if `text` fits neither form; the message says why.
    """
    if not text or len(text) > _LONGEST or any(ord(char) < 32 for char in text):
        raise InvalidReference(
            f"{text[:80]!r} is not a model reference: it is empty, longer than {_LONGEST} "
            "characters or holds control characters",
            hint="write org/name, org/name@revision, hf://org/name/subfolder or a local path",
        )
    if text.startswith(_LOCAL_PREFIXES) or text in (".", ".."):
        return LocalRef(_strip_file_scheme(text))
    return _parse_hub(text)


def parse_output(text: str, branch: str | None = None) -> Ref:
    """Read a reference to write to; the revision of one on the Hub is a branch, None the default.

    Args:
        text: the reference.
        branch: the branch where it is given apart; says the same as ``@branch``.

    Raises:
        InvalidReference: if a result cannot be published there.
    """
    ref = parse_ref(text)
    if isinstance(ref, LocalRef):
        return ref
    if "/" not in ref.repo_id:
        raise InvalidReference(
            f"{text!r} names no owner, and an output on the Hub needs one",
            hint="write org/name, or your user name in place of org; "
            f"a folder is written ./{ref.repo_id}",
        )
    if ref.subfolder is not None:
        raise InvalidReference(
            f"{text!r}: a result is a whole repo, not the folder {ref.subfolder!r} of one",
            hint="name a repo of its own, or a branch: org/name@branch",
        )
    if branch and ref.revision and branch != ref.revision:
        raise InvalidReference(f"{text!r} names another branch than {branch!r}, given besides")
    chosen = branch or ref.revision
    if chosen is not None and not _can_be_branch(chosen):
        raise InvalidReference(
            f"{chosen!r} cannot be the name of a branch to publish on",
            hint="write letters, digits, dots, dashes and slashes; a commit hash names no branch",
        )
    return HubRef(ref.repo_id, None if chosen == "main" else chosen)


def _can_be_branch(name: str) -> bool:
    """Say whether git takes the name, the Hub keeps it for nothing else, and neither do we."""
    if name.startswith(_RESERVED_BRANCHES) or _COMMIT.fullmatch(name):
        return False
    parts = name.split("/")
    odd = any(not part or part.startswith((".", "-")) or part.endswith(".lock") for part in parts)
    return not (odd or ".." in name or name.endswith(".") or _NOT_IN_BRANCH.search(name))


def resolve_local(ref: LocalRef, root: Path | None = None) -> Path:
    """Return the absolute path of a local reference, symlinks resolved.

    Args:
        ref: the reference.
        root: the folder that the service may touch; relative references start there. None (the
            command line) starts at the working directory and sets no limit.

    Raises:
        OutsideLocalRoot: if the path, its symlinks followed, leaves `root`.
        InvalidReference: if it names the home of nobody, or symlinks that go round in a circle.
    """
    if root is None:
        try:
            return Path(ref.path).expanduser().resolve()
        except (OSError, RuntimeError) as error:
            raise InvalidReference(
                f"{ref.path!r} cannot be made an absolute path: {str(error).rstrip('.')}",
                hint="write the path from the root on: /home/…",
            ) from error
    real_root = root.resolve()
    # The home of the service's own user is none of the caller's business: "~" stays a name.
    real = Path(os.path.realpath(real_root / ref.path))
    if real != real_root and real_root not in real.parents:
        raise OutsideLocalRoot(
            f"{ref.path!r} lies outside the folder this service may touch",
            hint="use a path below PISSA_LOCAL_ROOT, or a Hub reference",
        )
    return real


def _strip_file_scheme(text: str) -> str:
    if not text.startswith("file:"):
        return text
    path = text.removeprefix("file:")
    if path.startswith("//"):
        host, _, rest = path.removeprefix("//").partition("/")
        if host not in ("", "localhost"):
            raise InvalidReference(
                f"{text!r} names the host {host!r}; only local files can be read",
                hint="write file:///absolute/path",
            )
        path = "/" + rest
    if not path:
        raise InvalidReference(f"{text!r} names no folder")
    decoded = _decoded(path, text)
    return decoded if decoded.startswith(("/", "./", "../")) else f"./{decoded}"


def _parse_hub(text: str) -> HubRef:
    if "://" in text and not text.startswith("hf://"):
        raise InvalidReference(
            f"{text!r} is a URL; only hf:// is understood",
            hint="write hf://org/name, or org/name",
        )
    if text.startswith("hf://"):
        repo_id, revision, subfolder = _split_hub_path(text.removeprefix("hf://"), text)
    else:
        repo_id, at, revision = text.partition("@")
        subfolder = ""
        if at and ("/" in revision or not revision):
            raise InvalidReference(
                f"{text!r}: {revision!r} is not a revision",
                hint="percent-encode a slash in it: refs%2Fpr%2F1",
            )
    # Imported here: it brings an HTTP client along, for which a folder has no use.
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InvalidReference(
            f"{text!r} is not a Hub reference: {repo_id!r} is not a repo id (org/name)",
            hint="a local folder begins with /, ./, ../, ~ or file:",
        ) from error
    return HubRef(repo_id, _decoded(revision, text) or None, _checked_subfolder(subfolder, text))


def _decoded(quoted: str, text: str) -> str:
    decoded = unquote(quoted)
    if any(ord(char) < 32 for char in decoded):
        raise InvalidReference(f"{text!r} holds control characters, percent-encoded")
    return decoded


def _split_hub_path(path: str, text: str) -> tuple[str, str, str]:
    """Split ``org/name@revision/sub/folder`` or ``name@revision/sub``, revision optional."""
    first, slash, rest = path.partition("/")
    if "@" in first or not slash:
        repo_id, at, revision = first.partition("@")
    else:
        second, _, rest = rest.partition("/")
        name, at, revision = second.partition("@")
        repo_id = f"{first}/{name}"
    if at and not revision:
        raise InvalidReference(f"{text!r} has an @ with no revision behind it")
    return repo_id, revision, rest


def _checked_subfolder(subfolder: str, text: str) -> str | None:
    parts = PurePosixPath(subfolder).parts
    if any(part in ("..", "/") for part in parts) or "\\" in subfolder:
        raise InvalidReference(f"{text!r}: the subfolder {subfolder!r} leaves the repo")
    return "/".join(part for part in parts if part != ".") or None
