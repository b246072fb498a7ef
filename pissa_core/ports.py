"""Where checkpoints come from and where results go: two contracts, each with several adapters.

`adapters.local`, `adapters.hub` and `adapters.memory` implement them and pass one contract
suite (`tests/contract`). They carry bytes and ask no questions about them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

ByteRange = tuple[int, int]
"""Half-open ``[start, stop)``, in bytes from the start of a file."""


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of a checkpoint: its size in bytes, and its sha256 where the source knows it."""

    size: int
    sha256: str | None = None


class CheckpointSource(Protocol):
    """A checkpoint to read, pinned to one state of its files."""

    @property
    def ref(self) -> str:
        """The source as the manifest names it; a Hub ref carries the commit hash."""

    @property
    def commit(self) -> str | None:
        """The commit hash on the Hub; None for a folder, which has none."""

    @property
    def fingerprint(self) -> str:
        """A digest that differs whenever any file of the source may differ.

        A commit hash, or sizes and modification times: it names the staging area, so that work
        on an older state is never taken up again. It goes into no output file.
        """

    def files(self) -> Mapping[str, FileInfo]:
        """Return every file below the source, by its POSIX path relative to the source."""

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes ``[start, stop)`` of a file; no more is held or transferred.

        Raises:
            ShardTruncated: if the file ends before `stop`.
            SourceChanged: if the file is no longer what `files` said.
        """

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from a file, beginning at byte `start`; raises as `read` does."""

    def stream(self, path: str, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes ``[start, stop)`` of a file piece by piece; raises as `read` does.

        However long the range is, no more than some megabytes are held.
        """

    def fetch(self, path: str, destination: Path, *, holes: Sequence[ByteRange] = ()) -> bool:
        """Make `destination` a private copy of a file, safe to patch in place.

        Ranges in `holes` will be overwritten by the caller and may be left unwritten; returned is
        whether they hold the file's bytes all the same (of no meaning without holes). The copy has
        the source's size. Never a hard link, never a write through a symlink.
        """

    @property
    def rereads(self) -> bool:
        """Whether `read_into` is as cheap as reading the fetched copy (a local disk)."""

    def local_root(self) -> Path | None:
        """The folder behind the source, where there is one."""


@dataclass(frozen=True, slots=True)
class Seal:
    """The record that a shard is done: checksums of both its files, one row a matrix."""

    shard: str
    sha256: str
    size: int
    part_sha256: str
    part_size: int
    rows: tuple[Mapping[str, Any], ...]


class Attempt(Protocol):
    """One attempt's private scratch for one shard, gone or adoptable when the attempt ends."""

    @property
    def folder(self) -> Path:
        """The scratch folder, empty or as a dead attempt left it."""

    def seal(self, record: Seal, shard: Path, part: Path) -> None:
        """Hand over the finished shard and part, both already synced; durable when this returns.

        Exactly one attempt seals a shard. A later one (a worker that was stopped and woke up)
        changes nothing: what is sealed stays as it is.
        """


class CheckpointSink(Protocol):
    """Where a result goes: staged out of sight, then visible all at once."""

    @property
    def ref(self) -> str:
        """Where the result will be visible, as the manifest and the job's result name it."""

    @property
    def base_model_name_or_path(self) -> str:
        """How the adapter names the residual base: an absolute path, or a repo id."""

    @property
    def revision(self) -> str | None:
        """The branch the adapter must name, if it is not the default one."""

    def check(self, source: CheckpointSource) -> None:
        """Refuse, before any work, an output that cannot take the result.

        Raises:
            OutputExists, OutputIsSource, OutputInsideSource, NoWriteAccess.
        """

    def complaint_about(self, card: str) -> str | None:
        """Return why this place would refuse a README.md, in its own words; None: it takes it."""

    @property
    def scratch_folder(self) -> Path | None:
        """The folder below which every attempt's scratch lies; None if there is no one folder."""

    @property
    def publishing_folder(self) -> Path | None:
        """The scratch of `publish`; None if what it writes lies where the result will."""

    def free_bytes(self) -> int | None:
        """Bytes that staging may take, what it holds already included; None if not known."""

    def seal_of(self, shard: str) -> Seal | None:
        """Return the seal of a shard, if it has one and both its files still match it.

        A file that does not (cut short by a crash, altered since) loses its seal.
        """

    def seals_of(self, shards: Sequence[str]) -> tuple[Seal | None, ...]:
        """Return the seals of several shards, each as `seal_of` does, by one look at them all."""

    def adopt(self, shard: str, source: CheckpointSource, path: str) -> Seal | None:
        """Seal a shard that is the file `path` of the source without its bytes coming here.

        Such a seal has no rows and an empty part. None: it cannot be done, and the shard is to be
        fetched like any.
        """

    def attempt(self, shard: str) -> AbstractContextManager[Attempt]:
        """Open scratch for one attempt at a shard.

        What a dead attempt left (its journal, its private copy) is adopted; what a live one
        holds is never touched.
        """

    def read_part(self, shard: str, start: int, stop: int) -> bytes:
        """Return a range of a sealed shard's factor part."""

    def published(self) -> bytes | None:
        """Return the marker file that an earlier attempt at this result made visible, if any.

        It is known until `discard`: a caller killed between `publish` and its own record of the
        success finds here that all is done.
        """

    def publish(self, contents: Publication) -> None:
        """Make everything visible at once; does nothing if `published`.

        Killed at any point and called again, the result is the same; until it is there, nothing
        is. What was staged stays until `discard`, so that the caller can record the success
        first.

        Raises:
            OutputExists: if something else has appeared there meanwhile.
        """

    def discard(self, *, keep_sealed: bool = False) -> None:
        """Remove what is staged: everything, or all but sealed shards. What is published stays.

        Scratch that a live attempt holds is left to that attempt.
        """


@dataclass(frozen=True, slots=True)
class Publication:
    """What a sink makes visible: sealed shards, files copied, files streamed, files written last.

    Attributes:
        shards: seals of every shard, which appear at their own paths.
        copies: paths taken from the source byte for byte.
        streams: path → a callable that yields the file's bytes (the adapter, assembled).
        closing: called with every other file's path, size and sha256; returns the last files,
            which may state those checksums.
        marker: the one of the closing files by which the result is recognised.
    """

    source: CheckpointSource
    shards: tuple[Seal, ...]
    copies: tuple[str, ...]
    streams: Mapping[str, Callable[[], Iterable[bytes]]]
    closing: Callable[[Mapping[str, FileInfo]], Mapping[str, bytes]]
    marker: str


@dataclass(frozen=True, slots=True)
class PublishOptions:
    """On what terms a result is shown, where that can be chosen (on the Hub).

    Attributes:
        private: a repo that is made is private; one that is there must be.
        overwrite: what the branch holds makes way for the result.
        commit_message: None takes one of ours.
    """

    private: bool = False
    overwrite: bool = False
    commit_message: str | None = None
