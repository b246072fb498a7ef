"""What a commit is to change, and how to see in a tree that it has."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

from pissa_core.adapters.hub.client import HubFile, Pinned

Operation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete

_IN_GIT = 16 << 20  # beyond this the Hub stores no file in git itself, so nobody asks its blob id


@dataclass(frozen=True, slots=True)
class Change:
    """One commit to be: operations, and what each of their paths holds afterwards."""

    operations: Sequence[Operation]
    wanted: Mapping[str, HubFile | None]
    message: str

    @property
    def copies_from_elsewhere(self) -> bool:
        """Whether a file is to come straight from another repo."""
        return any(is_from_elsewhere(operation) for operation in self.operations)

    def is_made(self, there: Pinned) -> bool:
        """Whether a tree holds all of it."""
        return all(same(there.files.get(path), file) for path, file in self.wanted.items())


def same(have: HubFile | None, want: HubFile | None) -> bool:
    """Whether a file in a tree is the one that should be there (None: none should be)."""
    if have is None or want is None:
        return have is want
    if have.size != want.size:
        return False
    return have.sha256 == want.sha256 if have.sha256 else have.blob_id == want.blob_id


def described(content: Path | bytes, *, sha256: str | None = None) -> HubFile:
    """Say how a file will appear in a tree, whether the Hub keeps it in git or beside it."""
    size = content.stat().st_size if isinstance(content, Path) else len(content)
    if size > _IN_GIT and isinstance(content, Path):
        if sha256 is None:
            with content.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return HubFile(size, None, sha256)
    whole = content.read_bytes() if isinstance(content, Path) else content
    blob = hashlib.sha1(b"blob %d\0" % size + whole, usedforsecurity=False)
    return HubFile(size, blob.hexdigest(), sha256 or hashlib.sha256(whole).hexdigest())


def is_from_elsewhere(operation: Operation) -> bool:
    """Whether an operation copies a file from another repo."""
    return isinstance(operation, CommitOperationCopy) and operation.src_repo_id is not None
