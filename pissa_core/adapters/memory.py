"""Source and sink in memory: for tests and small experiments, held to the same contract suite."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pissa_core.errors import Cancelled, OutputExists, OutputIsSource, ShardTruncated
from pissa_core.ports import (
    Attempt,
    ByteRange,
    CheckpointSource,
    FileInfo,
    Publication,
    Seal,
)


class MemorySource:
    """A checkpoint given as ``{path: bytes}``."""

    commit = None
    rereads = True

    def __init__(self, contents: Mapping[str, bytes], *, ref: str = "memory:source") -> None:
        self._contents = dict(contents)
        self._ref = ref

    @property
    def ref(self) -> str:
        """The name it was given."""
        return self._ref

    @property
    def fingerprint(self) -> str:
        """Digest of every file's path and content."""
        digest = hashlib.sha256()
        for path in sorted(self._contents):
            digest.update(repr(path).encode() + hashlib.sha256(self._contents[path]).digest())
        return digest.hexdigest()

    def files(self) -> Mapping[str, FileInfo]:
        """Every file."""
        return {path: FileInfo(len(content)) for path, content in self._contents.items()}

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return a range of a file."""
        content = self._contents[path]
        if stop is not None and stop > len(content):
            raise ShardTruncated(f"{path}: byte {stop} was wanted and it ends at {len(content)}")
        return content[start:stop]

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from a file."""
        buffer[:] = self.read(path, start, start + len(buffer))

    def stream(self, path: str, start: int, stop: int) -> Iterator[bytes]:
        """Yield a range in one piece: it is in memory anyway."""
        yield self.read(path, start, stop)

    def fetch(self, path: str, destination: Path, *, holes: Sequence[ByteRange] = ()) -> bool:
        """Write a copy; holes are filled too, which the contract allows."""
        destination.write_bytes(self._contents[path])
        return True

    def local_root(self) -> None:
        """No folder stands behind it."""
        return


@dataclass
class _Sealed:
    seal: Seal
    shard: bytes
    part: bytes


@dataclass
class MemorySink:
    """A result kept as ``{path: bytes}`` in `contents`, empty until everything is there."""

    ref: str = "memory:output"
    contents: dict[str, bytes] = field(default_factory=dict)
    _marker: str | None = None
    _sealed: dict[str, _Sealed] = field(default_factory=dict)
    _scratch: dict[str, tempfile.TemporaryDirectory[str]] = field(default_factory=dict)
    _held: set[str] = field(default_factory=set)

    revision = None
    publishing_folder = None

    @property
    def base_model_name_or_path(self) -> str:
        """The same as `ref`."""
        return self.ref

    def check(self, source: CheckpointSource) -> None:
        """Refuse an output that holds something, or is the source."""
        if source.ref == self.ref:
            raise OutputIsSource(f"output and source are the same, {self.ref}")
        if self.contents and self._marker is None:
            raise OutputExists(f"{self.ref} exists and is not empty")

    @property
    def scratch_folder(self) -> None:
        """Each attempt has a temporary folder of its own."""
        return

    def complaint_about(self, card: str) -> None:
        """Never any."""

    def free_bytes(self) -> None:
        """Not known."""
        return

    def seal_of(self, shard: str) -> Seal | None:
        """Return the seal, if both contents still have its checksums."""
        sealed = self._sealed.get(shard)
        if sealed is None:
            return None
        intact = _sha256(sealed.shard) == sealed.seal.sha256 and (
            _sha256(sealed.part) == sealed.seal.part_sha256
        )
        if not intact:
            del self._sealed[shard]
            return None
        return sealed.seal

    def seals_of(self, shards: Sequence[str]) -> tuple[Seal | None, ...]:
        """Return the seals of several shards."""
        return tuple(self.seal_of(shard) for shard in shards)

    def adopt(self, shard: str, source: CheckpointSource, path: str) -> None:
        """Never: every byte of a result comes here."""

    @contextmanager
    def attempt(self, shard: str) -> Iterator[Attempt]:
        """Open scratch; an abandoned attempt's is adopted, a held one's is not."""
        adopted = None if shard in self._held else self._scratch.pop(shard, None)
        scratch = adopted or tempfile.TemporaryDirectory(prefix="pissa-memory-")
        attempt = _MemoryAttempt(Path(scratch.name), self)
        alone = shard not in self._held
        self._held.add(shard)
        try:
            yield attempt
        finally:
            if alone:
                self._held.discard(shard)
            if attempt.done or not alone:
                scratch.cleanup()
            else:
                self._scratch[shard] = scratch

    def read_part(self, shard: str, start: int, stop: int) -> bytes:
        """Return a range of a sealed part."""
        return self._sealed[shard].part[start:stop]

    def published(self) -> bytes | None:
        """Return the marker of a result that an earlier call made visible."""
        return None if self._marker is None else self.contents[self._marker]

    def publish(self, contents: Publication) -> None:
        """Fill `contents` in one step."""
        if self._marker is not None:
            return
        if self.contents:
            raise OutputExists(f"{self.ref} was filled by something else while this ran")
        result = {seal.shard: self._sealed[seal.shard].shard for seal in contents.shards}
        result |= {path: contents.source.read(path) for path in contents.copies}
        result |= {path: b"".join(chunks()) for path, chunks in contents.streams.items()}
        result |= contents.closing({path: _info(data) for path, data in result.items()})
        self.contents, self._marker = result, contents.marker

    def discard(self, *, keep_sealed: bool = False) -> None:
        """Forget what is staged, except scratch that an attempt holds."""
        for shard in [name for name in self._scratch if name not in self._held]:
            self._scratch.pop(shard).cleanup()
        if not keep_sealed:
            self._sealed.clear()
            self._marker = None


@dataclass
class _MemoryAttempt:
    folder: Path
    sink: MemorySink
    done: bool = False

    def seal(self, record: Seal, shard: Path, part: Path) -> None:
        """Keep both contents under the record, unless the shard is sealed already."""
        if self.done:
            raise Cancelled("this attempt has sealed already")
        self.done = True
        sealed = _Sealed(record, shard.read_bytes(), part.read_bytes())
        self.sink._sealed.setdefault(record.shard, sealed)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _info(content: bytes) -> FileInfo:
    return FileInfo(len(content), _sha256(content))
