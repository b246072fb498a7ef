"""Repos of the test Hub: blobs, commits, branches, and who may do what. Knows no HTTP."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".onnx", ".h5", ".msgpack", ".pt")
LFS_SIZE = 10 << 20


class Blob(Protocol):
    """The content of a file: bytes, a file on disk, or made on the fly."""

    @property
    def size(self) -> int: ...

    @property
    def sha256(self) -> str: ...

    def read(self, start: int, stop: int) -> bytes: ...


@dataclass(frozen=True)
class Bytes:
    content: bytes = field(repr=False)

    @property
    def size(self) -> int:
        return len(self.content)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def read(self, start: int, stop: int) -> bytes:
        return self.content[start:stop]


@dataclass(frozen=True)
class OnDisk:
    path: Path

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @cached_property
    def sha256(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def read(self, start: int, stop: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)


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


@dataclass
class Repo:
    """A model repo. `readers` and `writers` are user names besides the owner's."""

    id: str
    private: bool = False
    gated: bool = False
    disabled: bool = False
    readers: set[str] = field(default_factory=set)
    writers: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.id.partition("/")[0]

    def commit(
        self,
        changes: Mapping[str, Blob | bytes | Path | None],
        *,
        branch: str = "main",
        title: str = "a change",
    ) -> Commit:
        """Add, replace or (None) delete files on a branch; returns the commit."""
        parent = self.branches.get(branch)
        files = dict(self.commits[parent].files) if parent else {}
        for path, content in changes.items():
            if content is None:
                del files[path]
            else:
                files[path] = _file(path, content)
        tree = [(path, file.git_oid) for path, file in sorted(files.items())]
        oid = hashlib.sha1(repr([self.id, parent, title, tree]).encode()).hexdigest()
        made = Commit(oid, parent, title, dict(sorted(files.items())))
        self.commits[oid] = made
        self.branches[branch] = oid
        return made

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
    """A user's token; `forbidden` names repos that a fine-grained one leaves out."""

    user: str
    role: str = "write"
    valid: bool = True
    forbidden: set[str] = field(default_factory=set)


def files_in(folder: Path) -> dict[str, OnDisk]:
    """Every file below a folder as a blob, by its path there."""
    return {
        path.relative_to(folder).as_posix(): OnDisk(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _file(path: str, content: Blob | bytes | Path) -> File:
    if isinstance(content, bytes):
        content = Bytes(content)
    elif isinstance(content, Path):
        content = OnDisk(content)
    return File(content, path.endswith(LFS_SUFFIXES) or content.size > LFS_SIZE)
