"""The one commit that makes a result visible, put together from what is staged.

Shards are copied within the repo, large side files from the source's repo where the Hub can, and
only what is made now (the adapter, the report) is sent. A branch that does not exist yet is made
only when its commit is there, under another name: until then there is nothing to see.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationCopy, CommitOperationDelete

from pissa_core.adapters.disk import file_info, write_stream
from pissa_core.adapters.hub.changes import Change, Operation, described, is_from_elsewhere
from pissa_core.adapters.hub.client import HubFile, Pinned
from pissa_core.adapters.hub.source import HubSource
from pissa_core.adapters.hub.staging import Staging
from pissa_core.adapters.hub.sweeping import RESULT
from pissa_core.adapters.hub.uploading import Outgoing, is_sent
from pissa_core.adapters.hub.writer import DEFAULT_BRANCH, CannotCopy, HubWriter, Moved
from pissa_core.errors import Cancelled, OutputExists
from pissa_core.ports import FileInfo, Publication

ATTRIBUTES = ".gitattributes"
"""The Hub's own file, which it may add lines to at any commit."""

_SMALL = 1 << 20  # files up to this wait on the disk until they are sent together

_MOVES = 20
"""How often the target branch may move under us before that is called somebody else's work."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a result becomes visible, and on what terms."""

    branch: str
    overwrite: bool
    message: str


@dataclass(slots=True)
class _Built:
    """What the last commit adds, and how a tree shows that it has; `small` is still to be sent."""

    operations: list[Operation] = field(default_factory=list)
    wanted: dict[str, HubFile | None] = field(default_factory=dict)
    infos: dict[str, FileInfo] = field(default_factory=dict)
    small: list[tuple[Outgoing, FileInfo]] = field(default_factory=list)

    def add(self, operation: Operation, file: HubFile) -> None:
        path = operation.path_in_repo
        self.operations.append(operation)
        self.infos[path] = FileInfo(file.size, file.sha256)
        if path != ATTRIBUTES:
            self.wanted[path] = file

    def replacing(self, there: Pinned, message: str) -> Change:
        """Return the change that leaves nothing of a tree but what is built."""
        paths = {operation.path_in_repo for operation in self.operations}
        gone = sorted(set(there.files) - paths - {ATTRIBUTES})
        deletions = [_deletion_of(path) for path in gone]
        wanted = {**self.wanted, **dict.fromkeys(gone)}
        return Change([*deletions, *self.operations], wanted, message)


class Publisher:
    """Makes one publication visible on one branch."""

    def __init__(self, writer: HubWriter, staging: Staging, target: Target, folder: Path) -> None:
        """Work in `folder`, which is the caller's to remove."""
        self._writer = writer
        self._staging = staging
        self._target = target
        self._folder = folder

    def publish(self, contents: Publication) -> str:
        """Return the commit that shows the result.

        Raises:
            OutputExists: if something else has appeared there meanwhile.
            Cancelled: if what is staged was removed meanwhile.
        """
        staged = self._staging.required()
        built = self._complete(self._shards(contents, staged), contents)
        try:
            return self._show(built, contents.marker)
        except CannotCopy:
            return self._show(self._without_copying(built, contents), contents.marker)

    def _shards(self, contents: Publication, staged: Pinned) -> _Built:
        built = _Built()
        for seal in contents.shards:
            path, file = self._staging.file_of(seal.shard, staged)
            copy = CommitOperationCopy(path, seal.shard, src_revision=staged.commit)
            built.add(copy, HubFile(file.size, file.blob_id, seal.sha256))
        return built

    def _complete(self, built: _Built, contents: Publication) -> _Built:
        """Add what is no shard to the shards: copied, streamed, written last."""
        for path in contents.copies:
            file = large_file_of(contents, path, self._writer)
            if file is not None:
                built.add(_copy_of(contents.source, path), file)
                continue
            local = self._new_file()
            contents.source.fetch(path, local)
            self._send(built, path, local, file_info(local))
        for path, chunks in contents.streams.items():
            local = self._new_file()
            self._send(built, path, local, write_stream(local, chunks()))
        infos = {**built.infos, **{file.path: info for file, info in built.small}}
        for path, content in contents.closing(infos).items():
            built.small.append((Outgoing(path, content), FileInfo(len(content))))
        self._send_small(built)
        return built

    def _without_copying(self, built: _Built, contents: Publication) -> _Built:
        """Send here what the Hub does not copy from the source's repo; the rest is sent already."""
        elsewhere = {op.path_in_repo for op in built.operations if is_from_elsewhere(op)}
        kept = [op for op in built.operations if op.path_in_repo not in elsewhere]
        again = _Built(kept, dict(built.wanted), dict(built.infos))
        for path in sorted(elsewhere):
            local = self._new_file()
            contents.source.fetch(path, local)
            self._send(again, path, local, file_info(local))
        self._send_small(again)
        return again

    def _new_file(self) -> Path:
        return self._folder / secrets.token_hex(8)

    def _send(self, built: _Built, path: str, local: Path, info: FileInfo) -> None:
        """Send a large file and remove it here; keep a small one for later."""
        outgoing = Outgoing(path, local, info.sha256)
        if info.size <= _SMALL:
            built.small.append((outgoing, info))
            return
        (adding,) = self._writer.upload([outgoing], self._staging.branch)
        built.add(adding, described(local, sha256=info.sha256))
        if is_sent(adding):
            local.unlink()

    def _send_small(self, built: _Built) -> None:
        """Send all small files together: one question to the Hub in place of one each."""
        small = [file for file, _ in built.small]
        for file, adding in zip(
            small, self._writer.upload(small, self._staging.branch), strict=True
        ):
            built.add(adding, described(file.content, sha256=file.sha256))

    def _show(self, built: _Built, marker: str) -> str:
        """Commit, and see that the tree is what it should be."""
        for _ in range(_MOVES):
            branch, there = self._place()
            change = built.replacing(there, self._target.message)
            made = change.is_made(there)
            parent = None if made else there.commit
            self._staging.announce(_announcement(marker, built, parent))
            try:
                commit = there.commit if made else self._commit(change, branch, there)
            except Moved:
                continue
            self._check(change, commit)
            if branch == self._target.branch or self._point_at(commit):
                return commit
        raise self._taken()

    def _commit(self, change: Change, branch: str, there: Pinned) -> str:
        return self._writer.commit(change, branch=branch, parent=there.commit)

    def _place(self) -> tuple[str, Pinned]:
        """Return the branch to commit to, and what is on it."""
        there = self._writer.state(self._target.branch)
        if there is not None:
            if not self._target.overwrite and is_occupied(there, self._writer):
                raise self._taken()
            return self._target.branch, there
        self._writer.create_branch(self.hidden_branch, start=DEFAULT_BRANCH)
        hidden = self._writer.state(self.hidden_branch)
        if hidden is None:
            self._writer.check_still_there()
            raise Cancelled(f"the branch {self.hidden_branch} was removed while this ran")
        return self.hidden_branch, hidden

    @property
    def hidden_branch(self) -> str:
        """Where the commit is made that a new branch is then pointed at."""
        return self._staging.branch + RESULT

    def _point_at(self, commit: str) -> bool:
        """Make the target branch at a commit; say whether it is there and nowhere else."""
        self._writer.create_branch(self._target.branch, start=commit)
        there = self._writer.state(self._target.branch)
        return there is not None and there.commit == commit

    def _check(self, change: Change, commit: str) -> None:
        there = self._writer.state(commit)
        if there is None or not change.is_made(there):
            subject = self._writer.client.subject(self._writer.repo_id, commit, writing=True)
            raise subject.unavailable("did not keep what was sent to it").error

    def _taken(self) -> OutputExists:
        return OutputExists(
            f"{self._writer.repo_id} ({self._target.branch}) was filled by something else while "
            "this ran",
            hint="name another repo or branch, or allow it to be overwritten (--overwrite, or "
            "output.overwrite of a job), and run again",
        )


def is_occupied(there: Pinned, writer: HubWriter) -> bool:
    """Whether a branch holds more than the Hub itself puts there: attributes, an empty card."""
    rest = set(there.files) - {ATTRIBUTES}
    if rest - {"README.md"}:
        return True
    return bool(rest) and _has_text(writer.read(there, "README.md"))


def large_file_of(contents: Publication, path: str, writer: HubWriter) -> HubFile | None:
    """Return a file of the source that the same Hub may copy by itself, being a large one."""
    source = contents.source
    if not isinstance(source, HubSource) or source.endpoint != writer.client.endpoint:
        return None
    info = source.files()[path]
    return None if info.sha256 is None else HubFile(info.size, None, info.sha256)


def _deletion_of(path: str) -> CommitOperationDelete:
    deletion = CommitOperationDelete("a", is_folder=False)
    # Set behind the client's back: it names no path with .cache/ in it, and a git push may have.
    deletion.path_in_repo = path
    return deletion


def _copy_of(source: object, path: str) -> CommitOperationCopy:
    assert isinstance(source, HubSource)
    return CommitOperationCopy(
        source.path_in_repo(path),
        path,
        src_revision=source.commit,
        src_repo_id=source.repo_id,
        src_repo_type="model",
    )


def _announcement(marker: str, built: _Built, parent: str | None) -> Mapping[str, object]:
    """Say what will be seen where it is shown, and after which commit; None: it is there."""
    file = built.wanted[marker]
    assert file is not None
    return {
        "path": marker,
        "size": file.size,
        "blob_id": file.blob_id,
        "sha256": file.sha256,
        "parent": parent,
    }


def _has_text(card: bytes) -> bool:
    """Whether a card says anything below its metadata."""
    text = card.decode(errors="replace").strip()
    if text.startswith("---"):
        text = text[3:].partition("\n---")[2]
    return bool(text.strip())
