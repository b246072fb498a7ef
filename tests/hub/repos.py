"""Repos of the test Hub: blobs, commits, branches, and who may do what. Knows no HTTP."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from hub.blobs import Blob, Bytes, OnDisk

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".onnx", ".h5", ".msgpack", ".pt")
LFS_SIZE = 10 << 20


@dataclass(frozen=True)
class File:
    """A file of a commit, stored as git does: whole, or as a pointer to a large file."""

    blob: Blob
    lfs: bool

    @property
    def size(self) -> int:
        return self.blob.size

    @property
    def pointer(self) -> bytes:
        return (
            "version https://git-lfs.github.com/spec/v1\n"
            f"oid sha256:{self.blob.sha256}\nsize {self.blob.size}\n"
        ).encode()

    @cached_property
    def git_oid(self) -> str:
        content = self.pointer if self.lfs else self.blob.read(0, self.blob.size)
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.blob.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    files: Mapping[str, File]
    at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def date(self) -> str:
        return f"{self.at:%Y-%m-%dT%H:%M:%S}.000Z"


@dataclass
class Repo:
    """A model repo.

    Attributes:
        readers: user names besides the owner's; so with `writers`.
        objects: large files by checksum, committed or only uploaded.
    """

    id: str
    private: bool = False
    gated: bool = False
    disabled: bool = False
    readers: set[str] = field(default_factory=set)
    writers: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    objects: dict[str, Blob] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.id.partition("/")[0]

    def commit(
        self,
        changes: Mapping[str, File | Blob | bytes | Path | None],
        *,
        branch: str = "main",
        title: str = "a change",
    ) -> Commit:
        """Add, replace or (None) delete files on a branch; returns the commit."""
        parent = self.branches.get(branch)
        files = dict(self.commits[parent].files) if parent else {}
        for path, content in changes.items():
            if content is None:
                files.pop(path, None)
            else:
                files[path] = file = _file(path, content)
                if file.lfs:
                    self.objects[file.blob.sha256] = file.blob
        tree = [(path, file.git_oid) for path, file in sorted(files.items())]
        oid = hashlib.sha1(repr([self.id, parent, title, tree]).encode()).hexdigest()
        made = Commit(oid, parent, title, dict(sorted(files.items())))
        self.commits[oid] = made
        self.branches[branch] = oid
        return made

    def collect_garbage(self) -> None:
        """Forget large files that no commit of a branch or tag holds, as the Hub does in time."""
        heads = [*self.branches, *self.tags]
        kept = [
            file for head in heads for made in self.history(head) for file in made.files.values()
        ]
        self.objects = {file.blob.sha256: file.blob for file in kept if file.lfs}

    def resolve(self, revision: str) -> Commit | None:
        """Find a commit by branch, tag, full ref or hash."""
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        oid = self.branches.get(name) or self.tags.get(name) or revision
        return self.commits.get(oid)

    def history(self, revision: str) -> list[Commit]:
        """Commits of a revision, newest first."""
        found: list[Commit] = []
        commit = self.resolve(revision)
        while commit is not None:
            found.append(commit)
            commit = self.commits.get(commit.parent or "")
        return found


@dataclass
class Token:
    """A user's token.

    Attributes:
        role: read or write.
        forbidden: repos that a fine-grained one leaves out.
        writes: the only repos that a fine-grained one may change.
        orgs: organisations in which the user may write.
    """

    user: str
    role: str = "write"
    valid: bool = True
    forbidden: set[str] = field(default_factory=set)
    writes: set[str] | None = None
    orgs: set[str] = field(default_factory=set)

    def may_write(self, repo_id: str) -> bool:
        return self.role == "write" and (self.writes is None or repo_id in self.writes)


def files_in(folder: Path) -> dict[str, OnDisk]:
    """Every file below a folder as a blob, by its path there."""
    return {
        path.relative_to(folder).as_posix(): OnDisk(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def is_large(path: str, size: int) -> bool:
    """Say whether a file goes to the storage of large files."""
    return path.endswith(LFS_SUFFIXES) or size > LFS_SIZE


def _file(path: str, content: File | Blob | bytes | Path) -> File:
    if isinstance(content, File):
        return content
    if isinstance(content, bytes):
        content = Bytes(content)
    elif isinstance(content, Path):
        content = OnDisk(content)
    return File(content, is_large(path, content.size))
