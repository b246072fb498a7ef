"""The staging branch of one result: sealed shards and factor parts, out of everybody's sight.

It lies in the output repo and is named by the digest of what is being made, so that any worker
on any machine goes on from it::

    pissa-staging-DIGEST
      staged/<shard>/shard.safetensors   the finished shard, or the source's own where it stays
      staged/<shard>/part.safetensors    its factors; none for a shard that stays as it is
      staged/<shard>/seal.json           the record that both are done, in the same commit
      staged/published.json              the marker of the result about to become visible

A branch that nobody has added to for `KEPT` is stale: the next job for the same repo removes it.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationCopy

from pissa_core.adapters.hub.changes import Change, Operation, described, same
from pissa_core.adapters.hub.client import HubFile, Pinned
from pissa_core.adapters.hub.source import HubSource
from pissa_core.adapters.hub.uploading import Outgoing
from pissa_core.adapters.hub.waiting import Pause, pause
from pissa_core.adapters.hub.writer import DEFAULT_BRANCH, CannotCopy, HubWriter, Moved
from pissa_core.adapters.local.scratch import slug
from pissa_core.errors import Cancelled, RateLimited
from pissa_core.ports import Seal

PREFIX = "pissa-staging-"
KEPT = timedelta(days=7)
"""How long a staging branch may lie untouched before it is swept."""

COMMITS_AN_HOUR = 100
"""Seals of one job an hour; the Hub has been seen to refuse from 128 commits an hour on."""

_ANNOUNCED = "staged/published.json"
_HOUR = timedelta(hours=1)


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

    def __init__(self, writer: HubWriter, digest: str) -> None:
        """Open no connection yet."""
        self._writer = writer
        self.branch = PREFIX + digest
        self._seals: dict[str, tuple[Seal, Mapping[str, HubFile]]] = {}
        self._reading: _Reading | None = None
        self._seen = False
        self._sending = threading.Lock()

    def state(self) -> Pinned | None:
        """Return the branch's commit and files; None where there is none."""
        state = self._writer.state(self.branch)
        self._seen = self._seen or state is not None
        return state

    def open(self, *, private: bool) -> None:
        """Make the repo and the branch, where they are missing."""
        if not self._seen and self.state() is None:
            self._writer.create_repo(private=private)
            self._writer.create_branch(self.branch, start=DEFAULT_BRANCH)

    def seal_of(self, shard: str, state: Pinned | None = None) -> Seal | None:
        """Return a shard's seal, if both files are as they were when it was sealed."""
        state = state or self.state()
        entry = None if state is None else state.files.get(_seal_path(shard))
        if state is None or entry is None:
            return None
        seal, files = self._read_seal(state, shard, entry)
        intact = all(same(state.files.get(path), file) for path, file in files.items())
        return seal if intact else None

    def seal(self, record: Seal, shard: Path, part: Path) -> None:
        """Send both files and commit them with their seal; the first to do so wins.

        Raises:
            Cancelled: if the branch was removed meanwhile.
        """
        if self.seal_of(record.shard, self._required()) is not None:
            return
        outgoing = [
            Outgoing(_part_path(record.shard), part, record.part_sha256),
            Outgoing(_shard_path(record.shard), shard, record.sha256),
        ]
        files = {file.path: described(file.content, sha256=file.sha256) for file in outgoing}
        self._commit_seal(record, files, outgoing)

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
        try:
            files = {path: HubFile(record.size, None, record.sha256)}
            self._commit_seal(record, files, copies=[copy])
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
            state = self._required()
            if same(state.files.get(_ANNOUNCED), described(content)):
                return state.commit
            sent = self._writer.upload([Outgoing(_ANNOUNCED, content)], self.branch)
            wanted = {_ANNOUNCED: described(content)}
            try:
                change = Change(sent, wanted, "Announce the result")
                return self._writer.commit(change, branch=self.branch, parent=state.commit)
            except Moved:
                continue

    def announced(self) -> Mapping[str, Any] | None:
        """Return what was noted before a result was made visible."""
        state = self.state()
        if state is None or _ANNOUNCED not in state.files:
            return None
        noted: Mapping[str, Any] = json.loads(self._writer.read(state, _ANNOUNCED))
        return noted

    def discard(self) -> None:
        """Remove the branch and all that is on it."""
        self._seen = False
        self._writer.delete_branch(self.branch)

    def is_empty(self) -> bool:
        """Whether nothing is sealed."""
        state = self.state()
        return state is None or not _seals_in(state)

    def _commit_seal(
        self,
        record: Seal,
        files: Mapping[str, HubFile],
        outgoing: Sequence[Outgoing] = (),
        copies: Sequence[Operation] = (),
    ) -> None:
        # Shards of one process in turn: they share one line, and none sends what another just has.
        with self._sending:
            path = _seal_path(record.shard)
            text = {"seal": asdict(record), "files": {name: asdict(f) for name, f in files.items()}}
            content = json.dumps(text, sort_keys=True).encode()
            sent = self._writer.upload([*outgoing, Outgoing(path, content)], self.branch)
            change = Change(
                [*copies, *sent], {**files, path: described(content)}, f"Seal {record.shard}"
            )
            while True:
                state = self._required()
                if self.seal_of(record.shard, state) is not None:  # another was first
                    return
                self._keep_pace(state)
                try:
                    self._writer.commit(change, branch=self.branch, parent=state.commit)
                except Moved:
                    time.sleep(random.uniform(0, 0.2))
                else:
                    return

    def _keep_pace(self, state: Pinned) -> None:
        """Wait, if this job has committed so often that the Hub may soon refuse."""
        if _seals_in(state) < COMMITS_AN_HOUR:
            return
        times = [at for _, at in self._writer.history(state.commit)]
        seconds = pace_s(times, datetime.now(UTC))
        if seconds > 0:
            error = RateLimited(f"{COMMITS_AN_HOUR} shards were sealed within the hour")
            pause(Pause(error, seconds), self._writer.client.on_wait)

    def _required(self) -> Pinned:
        state = self.state()
        if state is None:
            raise Cancelled(f"the staging branch {self.branch} was discarded meanwhile")
        return state

    def _read_seal(
        self, state: Pinned, shard: str, entry: HubFile
    ) -> tuple[Seal, Mapping[str, HubFile]]:
        known = entry.sha256 or entry.blob_id or ""
        if known not in self._seals:
            text = json.loads(self._writer.read(state, _seal_path(shard)))
            seal = Seal(**{**text["seal"], "rows": tuple(text["seal"]["rows"])})
            files = {path: HubFile(**file) for path, file in text["files"].items()}
            self._seals[known] = seal, files
        return self._seals[known]

    def _begin(self, path: str, start: int) -> _Reading:
        state = self._required()
        size = state.files[path].size
        chunks = self._writer.client.stream(
            self._writer.repo_id, state.commit, path, start=start, stop=size, size=size
        )
        return _Reading(state.commit, path, start, chunks)


def pace_s(times: list[datetime], now: datetime) -> float:
    """Return how long to wait so that no hour sees more than `COMMITS_AN_HOUR` commits.

    Args:
        times: when each commit was made, newest first.
        now: the time.
    """
    if len(times) < COMMITS_AN_HOUR:
        return 0.0
    return max(0.0, (times[COMMITS_AN_HOUR - 1] + _HOUR - now).total_seconds())


def sweep_stale(writer: HubWriter, *, but: str, now: datetime | None = None) -> list[str]:
    """Remove staging branches of other results that nobody has added to for `KEPT`."""
    swept = []
    for branch in writer.branches():
        if not branch.startswith(PREFIX) or branch == but:
            continue
        state = writer.state(branch)
        if state is None or not _seals_in(state):
            continue  # nothing is lost with it, and its first shard may be in the making
        history = writer.history(state.commit)
        if history and history[0][1] < (now or datetime.now(UTC)) - KEPT:
            writer.delete_branch(branch)
            swept.append(branch)
    return swept


def _seals_in(state: Pinned) -> int:
    return sum(path.startswith("staged/") and path.endswith("/seal.json") for path in state.files)


def _folder(shard: str) -> str:
    return f"staged/{re.sub('[^A-Za-z0-9._-]', '_', slug(shard))}"


def _shard_path(shard: str) -> str:
    return f"{_folder(shard)}/shard.safetensors"


def _part_path(shard: str) -> str:
    return f"{_folder(shard)}/part.safetensors"


def _seal_path(shard: str) -> str:
    return f"{_folder(shard)}/seal.json"
