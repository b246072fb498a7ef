"""Contents, places and small publications that the contract suite works with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pissa_core.adapters.local import LocalSink
from pissa_core.adapters.memory import MemorySink, MemorySource
from pissa_core.ports import CheckpointSink, FileInfo, Publication, Seal

if TYPE_CHECKING:
    from hub.state import Hub

CONTENTS = {
    "config.json": b'{"architectures": ["Nothing"]}',
    "model.safetensors": bytes(range(256)) * 64,
    "sub/folder/notes.txt": b"kept as it is",
    "empty.txt": b"",
}


class Place:
    """A place for results: opens sinks on it again and again, and looks at what is visible."""

    def open(self, digest: str = "d1") -> CheckpointSink:
        raise NotImplementedError

    def visible(self) -> dict[str, bytes]:
        raise NotImplementedError

    def occupy(self) -> None:
        raise NotImplementedError


class MemoryPlace(Place):
    def __init__(self) -> None:
        self.sink = MemorySink()

    def open(self, digest: str = "d1") -> CheckpointSink:
        return self.sink

    def visible(self) -> dict[str, bytes]:
        return self.sink.contents

    def occupy(self) -> None:
        self.sink.contents["other.txt"] = b"somebody else's"


class LocalPlace(Place):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, digest: str = "d1") -> CheckpointSink:
        return LocalSink(self.folder, digest=digest)

    def visible(self) -> dict[str, bytes]:
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in files}

    def occupy(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "other.txt").write_bytes(b"somebody else's")


def contents_of(hub: Hub, repo_id: str, branch: str = "main") -> dict[str, bytes]:
    """What a branch shows, but for the Hub's own .gitattributes."""
    commit = hub.repos[repo_id].resolve(branch) if repo_id in hub.repos else None
    files = {} if commit is None else commit.files
    return {
        path: file.blob.read(0, file.size)
        for path, file in files.items()
        if path != ".gitattributes"
    }


class HubPlace(Place):
    """The repo somebody/out, which no test has to make; `open` opens sinks of one owner."""

    def __init__(self, hub: Hub, open_sink: Callable[[str], CheckpointSink]) -> None:
        self.hub = hub
        self.open_sink = open_sink

    def open(self, digest: str = "d1") -> CheckpointSink:
        return self.open_sink(digest)

    def visible(self) -> dict[str, bytes]:
        return contents_of(self.hub, "somebody/out")

    def occupy(self) -> None:
        self.hub.repos["somebody/out"].commit({"other.txt": b"somebody else's"})


SHARD, PART = b"shard bytes" * 100, b"part bytes" * 10


def make_seal(shard: bytes = SHARD, part: bytes = PART, name: str = "model.safetensors") -> Seal:
    return Seal(
        shard=name,
        sha256=hashlib.sha256(shard).hexdigest(),
        size=len(shard),
        part_sha256=hashlib.sha256(part).hexdigest(),
        part_size=len(part),
        rows=({"module": "a", "energy": 0.5},),
    )


def seal_in(sink, shard: bytes = SHARD, part: bytes = PART) -> None:
    with sink.attempt("model.safetensors") as attempt:
        seal_attempt(attempt, shard, part)


def seal_attempt(attempt, shard: bytes = SHARD, part: bytes = PART) -> None:
    (attempt.folder / "shard").write_bytes(shard)
    (attempt.folder / "part").write_bytes(part)
    attempt.seal(make_seal(shard, part), attempt.folder / "shard", attempt.folder / "part")


def named_seal_in(sink, name: str) -> None:
    """Seal a shard of its own content."""
    shard, part = name.encode() * 100, name.encode() * 10
    with sink.attempt(name) as attempt:
        (attempt.folder / "shard").write_bytes(shard)
        (attempt.folder / "part").write_bytes(part)
        seal = make_seal(shard, part, name)
        attempt.seal(seal, attempt.folder / "shard", attempt.folder / "part")


def publication(**changes) -> Publication:
    def closing(files: dict[str, FileInfo]) -> dict[str, bytes]:
        return {"manifest.json": repr(sorted(files)).encode()}

    given = {
        "source": MemorySource(CONTENTS),
        "shards": (make_seal(),),
        "copies": ("config.json", "sub/folder/notes.txt"),
        "streams": {"init/adapter.bin": lambda: [b"one", b"two"]},
        "closing": closing,
        "marker": "manifest.json",
    }
    return Publication(**{**given, **changes})
