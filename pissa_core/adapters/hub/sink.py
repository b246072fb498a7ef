"""A model repo on the Hub as a sink: staged on a branch of its own, shown by one commit."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from pissa_core.adapters.disk import disk_errors, make_folder
from pissa_core.adapters.hub.changes import same
from pissa_core.adapters.hub.client import HubClient, HubFile, Pinned
from pissa_core.adapters.hub.pacing import Pace
from pissa_core.adapters.hub.publishing import Publisher, Target, is_occupied
from pissa_core.adapters.hub.source import HubSource
from pissa_core.adapters.hub.staging import Staging
from pissa_core.adapters.hub.sweeping import KEPT, sweep_stale
from pissa_core.adapters.hub.writer import DEFAULT_BRANCH, HubWriter
from pissa_core.adapters.local.scratch import (
    discard_old,
    discard_result,
    discard_scratch,
    open_scratch,
    remove_if_empty,
    remove_scratch,
    share,
    slug,
)
from pissa_core.errors import Cancelled, OutputExists, OutputIsSource
from pissa_core.ports import Attempt, CheckpointSource, Publication, PublishOptions, Seal
from pissa_core.refs import HubRef

MESSAGE = "Model made by pissa-service"
_PUBLISHING = ".publishing"  # no shard's folder, since a slug ends in eight digits


@dataclass(frozen=True, slots=True)
class HubAttempt:
    """One attempt's scratch on this machine, and the branch that takes what it finishes."""

    folder: Path
    staging: Staging

    def seal(self, record: Seal, shard: Path, part: Path) -> None:
        """Send both files and commit them with their seal; then the scratch goes."""
        try:
            self.staging.seal(record, shard, part)
        except Cancelled:  # what it belongs to is gone
            remove_scratch(self.folder)
            raise
        remove_scratch(self.folder)


class HubSink:
    """A model repo that shows nothing of a result until one commit shows all of it."""

    def __init__(
        self,
        ref: HubRef,
        *,
        digest: str,
        scratch: Path,
        options: PublishOptions | None = None,
        token: str | None = None,
        endpoint: str | None = None,
        client: HubClient | None = None,
        writer: HubWriter | None = None,
        pace: Pace | None = None,
    ) -> None:
        """Aim at a repo; nothing is opened yet.

        Args:
            ref: the repo; its revision is the branch (None: the default one).
            digest: names the staging branch.
            scratch: a folder on this machine for work in progress, shared by all results.
            options: how the result is published.
            token: for this sink alone; None uses the process's own.
            endpoint: the Hub's address; None uses the process's own.
            client: used in place of one made from `token` and `endpoint`.
            writer: used in place of one made from `client`.
            pace: how often to commit.
        """
        self._repo_id = ref.repo_id
        self._branch = ref.revision or DEFAULT_BRANCH
        self._options = options or PublishOptions()
        self._writer = writer or HubWriter(
            client or HubClient(token=token, endpoint=endpoint), ref.repo_id
        )
        self._scratch = scratch / digest
        self._staging = Staging(self._writer, digest, self._scratch, pace)
        self._commit: str | None = None

    @property
    def ref(self) -> str:
        """The repo, at the branch, or at the result's commit once it is known."""
        return str(HubRef(self._repo_id, self._commit or self.revision))

    @property
    def base_model_name_or_path(self) -> str:
        """The repo id."""
        return self._repo_id

    @property
    def revision(self) -> str | None:
        """The branch, if it is not the default one."""
        return None if self._branch == DEFAULT_BRANCH else self._branch

    def check(self, source: CheckpointSource) -> None:
        """Refuse a repo that may not be written, holds something, or is the source."""
        private = self._writer.is_private()
        if private is None:
            self._writer.check_may_create()
        else:
            there = self._writer.state(self._branch)
            self._refuse_source(source, there)
            self._writer.check_may_write()
            self._refuse_occupied(there, private)
            sweep_stale(self._writer, but=self._staging.branch)
        with disk_errors(self._scratch):
            make_folder(self._scratch.parent)

    def complaint_about(self, card: str) -> str | None:
        """Ask the Hub, as its client does before a commit."""
        return self._writer.complaint_about(card)

    @property
    def scratch_folder(self) -> Path:
        """The folder that all results on this machine share."""
        return self._scratch.parent

    def free_bytes(self) -> None:
        """Not known: what is staged lies on the Hub."""
        return

    def seal_of(self, shard: str) -> Seal | None:
        """Read a shard's seal from the staging branch; neither of its files is downloaded."""
        return self._staging.seal_of(shard)

    def seals_of(self, shards: Sequence[str]) -> tuple[Seal | None, ...]:
        """Read seals from the staging branch, whose files are listed once."""
        return self._staging.seals_of(shards)

    def adopt(self, shard: str, source: CheckpointSource, path: str) -> Seal | None:
        """Seal a shard that stays as it is by a copy within the Hub, if the Hub can."""
        if not self._is_on_this_hub(source):
            return None
        info = source.files()[path]
        if info.sha256 is None:
            return None
        self._staging.open(private=self._options.private)
        empty = hashlib.sha256(b"").hexdigest()
        record = Seal(shard, info.sha256, info.size, part_sha256=empty, part_size=0, rows=())
        try:
            with disk_errors(self._scratch):
                sealed = self._staging.adopt(record, source, path)
        finally:
            remove_if_empty(self._scratch)
        return record if sealed else None

    @contextmanager
    def attempt(self, shard: str) -> Iterator[Attempt]:
        """Open scratch of our own, taking over what a dead attempt on this machine left."""
        self._staging.open(private=self._options.private)
        work = self._scratch / slug(shard)
        with disk_errors(work):
            discard_old(self._scratch.parent, KEPT)
            folder, lock = open_scratch(work)
        try:
            yield HubAttempt(folder, self._staging)
        finally:
            os.close(lock)
            remove_if_empty(work, self._scratch)

    def read_part(self, shard: str, start: int, stop: int) -> bytes:
        """Return a range of a sealed part, from the staging branch."""
        return self._staging.read_part(shard, start, stop)

    def published(self) -> bytes | None:
        """Return the marker that an earlier attempt's commit made visible."""
        announced = self._staging.announced()
        there = None if announced is None else self._writer.state(self._branch)
        if announced is None or there is None:
            return None
        path = announced["path"]
        file = HubFile(announced["size"], announced["blob_id"], announced["sha256"])
        if there.commit == announced["parent"] or not same(there.files.get(path), file):
            return None  # announced and never shown, though an older result may have this marker
        self._commit = self._commit or self._commit_after(announced["parent"], there)
        return self._writer.read(there, path)

    def publish(self, contents: Publication) -> None:
        """Make one commit on the target branch: copies of what is staged, and what is made now."""
        if self.published() is not None:
            return
        with disk_errors(self._scratch), self._publishing() as folder:
            self._commit = self._publisher(folder).publish(contents)

    @property
    def publishing_folder(self) -> Path:
        """Where what is not staged lies while it is being sent."""
        return self._scratch / _PUBLISHING

    @contextmanager
    def _publishing(self) -> Iterator[Path]:
        """Make a folder for one attempt at publishing, removing what dead ones left."""
        work = self.publishing_folder
        shared = share(work)
        try:
            folder, lock = open_scratch(work)
            try:
                yield folder
            finally:
                remove_scratch(folder)
                os.close(lock)
        finally:
            os.close(shared)
            discard_scratch(work)  # unless another attempt shares it
            remove_if_empty(self._scratch)

    def discard(self, *, keep_sealed: bool = False) -> None:
        """Remove the staging branch, and scratch that no live attempt on this machine holds."""
        discard_result(self._scratch)
        if keep_sealed and not self._staging.is_empty():
            return
        self._writer.delete_branch(self._publisher(self._scratch).hidden_branch)
        self._staging.discard()

    def _publisher(self, folder: Path) -> Publisher:
        message = self._options.commit_message or MESSAGE
        target = Target(self._branch, self._options.overwrite, message)
        return Publisher(self._writer, self._staging, target, folder)

    def _refuse_occupied(self, there: Pinned | None, private: bool) -> None:
        if self._options.private and not private:
            raise OutputExists(
                f"{self._repo_id} exists and is public, and a private output was asked for",
                hint="make it private in its settings, name another repo, or leave private out",
            )
        if there is None or self._options.overwrite or not is_occupied(there, self._writer):
            return
        if self.published() is None:
            raise OutputExists(
                f"{self._repo_id} ({self._branch}) exists and is not empty",
                hint="name another repo or branch, or allow it to be overwritten (--overwrite, or "
                "output.overwrite of a job)",
            )

    def _refuse_source(self, source: CheckpointSource, there: Pinned | None) -> None:
        if there is None or not self._is_on_this_hub(source):
            return
        if source.repo_id.lower() != self._repo_id.lower():
            return
        if source.commit == there.commit or (source.asked or DEFAULT_BRANCH) == self._branch:
            raise OutputIsSource(
                f"output and source are the same branch {self._branch} of {self._repo_id}",
                hint="name another repo, or a branch of its own; the source is never changed",
            )

    def _is_on_this_hub(self, source: CheckpointSource) -> TypeGuard[HubSource]:
        return isinstance(source, HubSource) and source.endpoint == self._writer.client.endpoint

    def _commit_after(self, parent: str | None, there: Pinned) -> str:
        """Return the commit that was put right after `parent`; later ones are somebody else's."""
        commits = [commit for commit, _ in self._writer.history(there.commit)]
        after = commits.index(parent) - 1 if parent in commits else 0
        return commits[max(after, 0)]
