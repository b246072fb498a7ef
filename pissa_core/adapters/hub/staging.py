"""The staging branch of one result: sealed shards and factor parts, out of everybody's sight.

It lies in the output repo and is named by the digest of what is being made, so that any worker
on any machine goes on from it::

    pissa-staging-DIGEST
      staged/<shard>/shard.safetensors   the finished shard, or the source's own where it stays
      staged/<shard>/part.safetensors    its factors; none for a shard that stays as it is
      staged/<shard>/seal.json           the record that both are done, in the same commit
      staged/begun.json                  in the branch's first commit, from which its age counts
      staged/published.json              the marker of the result about to become visible
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationCopy

from pissa_core.adapters.hub.changes import Change, described, same
from pissa_core.adapters.hub.client import HubFile, Pinned
from pissa_core.adapters.hub.pacing import Pace
from pissa_core.adapters.hub.pending import Pending, Ready
from pissa_core.adapters.hub.sealing import Sealing, seals_in
from pissa_core.adapters.hub.source import HubSource
from pissa_core.adapters.hub.sweeping import PREFIX
from pissa_core.adapters.hub.uploading import Outgoing
from pissa_core.adapters.hub.writer import DEFAULT_BRANCH, CannotCopy, HubWriter, Moved
from pissa_core.adapters.local.scratch import slug
from pissa_core.errors import Cancelled
from pissa_core.ports import Seal

SCHEMA = 1
"""Of seal records; one of another schema is none to us, and its shard is done again."""

_ANNOUNCED = "staged/published.json"
_BEGUN = "staged/begun.json"


@dataclass(slots=True)
class _Reading:
    """A part being read from one end to the other: one request, not one a piece."""

    commit: str
    path: str
    position: int
    chunks: Iterator[bytes]
    rest: bytearray = field(default_factory=bytearray)

    def take(self, nbytes: int) -> bytes:
        while len(self.rest) < nbytes:
            self.rest += next(self.chunks)
        taken = bytes(self.rest[:nbytes])
        del self.rest[:nbytes]
        self.position += nbytes
        return taken


class Staging:
    """What of one result is done, and the doing of it."""

    def __init__(
        self, writer: HubWriter, digest: str, folder: Path, pace: Pace | None = None
    ) -> None:
        """Open no connection yet.

        Args:
            writer: to the repo.
            digest: of the result.
            folder: shared by all attempts at this result on this machine.
            pace: how often to commit.
        """
        self._writer = writer
        self.branch = PREFIX + digest
        self._seals: dict[str, tuple[Seal, Mapping[str, HubFile]] | None] = {}
        self._reading: _Reading | None = None
        self._listed: Pinned | None = None  # where parts are read from, once all are there
        self._seen = False
        self._opening, self._sending = threading.Lock(), threading.Lock()
        self._sealing = Sealing(
            writer,
            self.branch,
            pending=Pending(folder / ".sealing"),  # no shard's folder: it has no digest
            pace=pace or Pace(),
            required=self.required,
            is_sealed=lambda shard, state: self.seal_of(shard, state) is not None,
        )

    def state(self) -> Pinned | None:
        """Return the branch's commit and files; None where there is none."""
        state = self._writer.state(self.branch)
        self._seen = self._seen or state is not None
        return state

    def required(self) -> Pinned:
        """Return the branch's commit and files.

        Raises:
            Cancelled: if the branch was removed meanwhile.
            AccessError: if the repo was, or the token is no longer good.
        """
        state = self.state()
        if state is None:
            self._writer.check_still_there()
            raise Cancelled(f"the staging branch {self.branch} was discarded meanwhile")
        return state

    def open(self, *, private: bool) -> None:
        """Make the repo and the branch, where they are missing."""
        with self._opening:
            if self._seen or self.state() is not None:
                return
            self._writer.create_repo(private=private)
            self._writer.create_branch(self.branch, start=DEFAULT_BRANCH)
            state = self.required()
            if _BEGUN not in state.files:
                with suppress(Moved):
                    self._note(_BEGUN, b"{}", state, "Begin")

    def seal_of(self, shard: str, state: Pinned | None = None) -> Seal | None:
        """Return a shard's seal, if both files are as they were when it was sealed."""
        state = state or self.state()
        entry = None if state is None else state.files.get(_seal_path(shard))
        if state is None or entry is None:
            return None
        found = self._read_seal(state, shard, entry)
        if found is None:
            return None
        seal, files = found
        intact = all(same(state.files.get(path), file) for path, file in files.items())
        return seal if intact else None

    def seals_of(self, shards: Sequence[str]) -> tuple[Seal | None, ...]:
        """Return the seals of several shards, by one look at the branch.

        Raises:
            Cancelled, AccessError: as `required` does.
        """
        state = self._listed = self.required()
        return tuple(self.seal_of(shard, state) for shard in shards)

    def seal(self, record: Seal, shard: Path, part: Path) -> None:
        """Send both files and commit them with their seal; the first to do so wins.

        Raises:
            Cancelled: if the branch was removed meanwhile.
        """
        if self.seal_of(record.shard, self.required()) is not None:
            return
        outgoing = [
            Outgoing(_part_path(record.shard), part, record.part_sha256),
            Outgoing(_shard_path(record.shard), shard, record.sha256),
        ]
        files = {file.path: described(file.content, sha256=file.sha256) for file in outgoing}
        self._sealing.commit(self._ready(record, files, outgoing))

    def adopt(self, record: Seal, source: HubSource, origin: str) -> bool:
        """Seal a shard that stays as it is by a copy within the Hub; say whether it could be."""
        path = _shard_path(record.shard)
        copy = CommitOperationCopy(
            source.path_in_repo(origin),
            path,
            src_revision=source.commit,
            src_repo_id=source.repo_id,
            src_repo_type="model",
        )
        files = {path: HubFile(record.size, None, record.sha256)}
        try:
            self._sealing.commit(self._ready(record, files, copies=[copy]))
        except CannotCopy:
            return False
        return True

    def file_of(self, shard: str, state: Pinned) -> tuple[str, HubFile]:
        """Return the path and the entry of a sealed shard."""
        path = _shard_path(shard)
        return path, state.files[path]

    def read_part(self, shard: str, start: int, stop: int) -> bytes:
        """Return a range of a sealed part; ranges that follow each other share one request."""
        reading, path = self._reading, _part_path(shard)
        if reading is None or reading.path != path or reading.position != start:
            reading = self._reading = self._begin(path, start)
        try:
            return reading.take(stop - start)
        except BaseException:
            self._reading = None
            raise

    def announce(self, announced: Mapping[str, Any]) -> str:
        """Note what is about to become visible; return the commit that holds the note."""
        content = json.dumps(announced, sort_keys=True).encode()
        while True:
            state = self.required()
            if same(state.files.get(_ANNOUNCED), described(content)):
                return state.commit
            with suppress(Moved):
                return self._note(_ANNOUNCED, content, state, "Announce the result")

    def announced(self) -> Mapping[str, Any] | None:
        """Return what was noted before a result was made visible."""
        state = self.state()
        if state is None or _ANNOUNCED not in state.files:
            return None
        noted: Mapping[str, Any] = json.loads(self._writer.read(state, _ANNOUNCED))
        return noted

    def discard(self) -> None:
        """Remove the branch and all that is on it."""
        self._seen, self._listed = False, None
        self._writer.delete_branch(self.branch)

    def is_empty(self) -> bool:
        """Whether nothing is sealed."""
        state = self.state()
        return state is None or not seals_in(state)

    def _ready(
        self,
        record: Seal,
        files: Mapping[str, HubFile],
        outgoing: Sequence[Outgoing] = (),
        copies: Sequence[CommitOperationCopy] = (),
    ) -> Ready:
        """Send all that a commit of a seal only names."""
        path = _seal_path(record.shard)
        text = {
            "schema": SCHEMA,
            "seal": asdict(record),
            "files": {name: asdict(file) for name, file in files.items()},
        }
        content = json.dumps(text, sort_keys=True).encode()
        with self._sending:  # in turn: what goes at once shares one line anyway
            sent = self._writer.upload([*outgoing, Outgoing(path, content)], self.branch)
        return Ready(record.shard, (*copies, *sent), {**files, path: described(content)})

    def _note(self, path: str, content: bytes, state: Pinned, message: str) -> str:
        sent = self._writer.upload([Outgoing(path, content)], self.branch)
        change = Change(sent, {path: described(content)}, message)
        return self._writer.commit(change, branch=self.branch, parent=state.commit)

    def _read_seal(
        self, state: Pinned, shard: str, entry: HubFile
    ) -> tuple[Seal, Mapping[str, HubFile]] | None:
        known = entry.sha256 or entry.blob_id or ""
        if known not in self._seals:
            self._seals[known] = _parsed(self._writer.read(state, _seal_path(shard)))
        return self._seals[known]

    def _begin(self, path: str, start: int) -> _Reading:
        state = self._listed
        if state is None or path not in state.files:
            state = self._listed = self.required()
        size = state.files[path].size
        chunks = self._writer.client.stream(
            self._writer.repo_id, state.commit, path, start=start, stop=size, size=size
        )
        return _Reading(state.commit, path, start, chunks)


def _parsed(content: bytes) -> tuple[Seal, Mapping[str, HubFile]] | None:
    """Read a seal record; None if it is none that this version writes."""
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        text = json.loads(content)
        if text["schema"] == SCHEMA:
            seal = Seal(**{**text["seal"], "rows": tuple(text["seal"]["rows"])})
            return seal, {path: HubFile(**file) for path, file in text["files"].items()}
    return None


def _folder(shard: str) -> str:
    return f"staged/{re.sub('[^A-Za-z0-9._-]', '_', slug(shard))}"


def _shard_path(shard: str) -> str:
    return f"{_folder(shard)}/shard.safetensors"


def _part_path(shard: str) -> str:
    return f"{_folder(shard)}/part.safetensors"


def _seal_path(shard: str) -> str:
    return f"{_folder(shard)}/seal.json"
