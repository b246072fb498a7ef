"""Writing to one repo on the Hub: who may, branches, uploads, and commits that are never doubled.

A commit is the one call that must not simply be made again: the Hub may have made it although
its answer was an error, or none. After any trouble the branch is compared with what it should
hold before anything else is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TypeVar

from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    FileDuplicationError,
    HfHubHTTPError,
)
from huggingface_hub.utils import hf_raise_for_status

from pissa_core.adapters.hub.changes import Change
from pissa_core.adapters.hub.client import HubClient, Pinned
from pissa_core.adapters.hub.permissions import may_create
from pissa_core.adapters.hub.trouble import TROUBLES, Subject
from pissa_core.adapters.hub.uploading import (
    Outgoing,
    addition_of,
    plain_errors,
    status_of,
)
from pissa_core.adapters.hub.waiting import COMMIT, TRANSFER, Patience, Trouble, Waiting
from pissa_core.errors import NoWriteAccess, PissaError, RepoNotFound, RevisionNotFound

DEFAULT_BRANCH = "main"

_STALE_PARENT = 412
Answer = TypeVar("Answer")


class Moved(Exception):
    """The branch is no longer where the commit was to be put; look again, then decide again."""


class CannotCopy(Exception):
    """The Hub does not copy this file from the other repo; it must be downloaded and sent."""


@dataclass(frozen=True, slots=True)
class Patiences:
    """How long each kind of call that writes goes on."""

    transfer: Patience = TRANSFER
    commit: Patience = COMMIT


class HubWriter:
    """Calls that change one model repo; safe to use from several threads."""

    def __init__(
        self, client: HubClient, repo_id: str, *, patiences: Patiences | None = None
    ) -> None:
        """Open no connection yet."""
        self.client = client
        self.repo_id = repo_id
        self._patiences = patiences or Patiences()

    def is_private(self) -> bool | None:
        """Whether the repo is private; None if there is none, or none that this token sees."""
        api = self.client.api
        try:
            info = self._ask(lambda: api.model_info(self.repo_id))
        except RepoNotFound:
            return None
        return bool(info.private)

    def state(self, branch: str) -> Pinned | None:
        """Return a branch's commit and files; None where there is no such branch, or repo."""
        try:
            return self.client.pin(self.repo_id, branch, self._patiences.transfer)
        except (RepoNotFound, RevisionNotFound):
            return None

    def read(self, there: Pinned, path: str) -> bytes:
        """Return the whole content of a small file."""
        size = there.files[path].size
        chunks = self.client.stream(self.repo_id, there.commit, path, start=0, stop=size, size=size)
        return b"".join(chunks)

    def check_may_write(self) -> None:
        """Ask whether the token may write to the repo, which exists.

        Raises:
            NoWriteAccess, TokenInvalid.
        """
        api = self.client.api
        self._change(lambda: api.auth_check(self.repo_id, write=True))

    def check_may_create(self) -> None:
        """Ask whether the token may make the repo, which does not exist.

        Raises:
            NoWriteAccess, TokenInvalid.
        """
        subject = self._writing()
        if not subject.with_token:  # the client does not even ask
            raise subject.not_allowed()
        who = self.client.call(self.client.api.whoami, subject, self._patiences.transfer)
        owner = self.repo_id.partition("/")[0]
        if not may_create(who, owner):
            raise NoWriteAccess(
                f"{self.repo_id} does not exist, and the token of {who.get('name')} may not make "
                f"repos for {owner}",
                hint=f"choose a name of your own, or make a token with the right to write at "
                f"{subject.site}/settings/tokens",
            )

    def complaint_about(self, card: str) -> str | None:
        """Return what the Hub has against a model card's metadata; None if it takes it."""
        asked = {"content": card, "repoType": "model"}

        def ask() -> str | None:
            response = self.client.post("/api/validate-yaml", asked)
            errors = response.json().get("errors", []) if response.status_code == 400 else []
            if errors:
                return " ".join(" ".join(str(error.get("message")).split()) for error in errors)
            hf_raise_for_status(response)
            return None

        return self._ask(ask)

    def check_still_there(self) -> None:
        """Say why what was found in the repo before is not, if the repo itself is the reason.

        Raises:
            TokenInvalid: if the token was revoked meanwhile.
            RepoNotFound: if the repo was removed meanwhile, or is out of the token's sight.
        """
        if self.is_private() is not None:
            return
        subject = self._writing()
        if subject.with_token:
            self.client.call(self.client.api.whoami, subject, self._patiences.transfer)
        raise subject.gone()

    def create_repo(self, *, private: bool) -> None:
        """Make the repo, unless it is there."""
        # None leaves it to the owner: an organisation's own default may be private.
        asked = True if private else None
        api = self.client.api
        self._change(lambda: api.create_repo(self.repo_id, exist_ok=True, private=asked))

    def create_branch(self, branch: str, *, start: str = DEFAULT_BRANCH) -> None:
        """Make a branch at a commit or another branch's, unless it is there."""
        api = self.client.api
        self._change(
            lambda: api.create_branch(self.repo_id, branch=branch, revision=start, exist_ok=True)
        )

    def delete_branch(self, branch: str) -> None:
        """Remove a branch, if it is there."""
        api = self.client.api
        try:
            self._change(lambda: api.delete_branch(self.repo_id, branch=branch))
        except (RepoNotFound, RevisionNotFound):
            return

    def branches(self) -> tuple[str, ...]:
        """Return the names of all branches."""
        api = self.client.api
        refs = self._ask(lambda: api.list_repo_refs(self.repo_id))
        return tuple(ref.name for ref in refs.branches)

    def history(self, revision: str) -> list[tuple[str, datetime]]:
        """Return hash and time of every commit of a revision, newest first."""
        api = self.client.api
        commits = self._ask(lambda: list(api.list_repo_commits(self.repo_id, revision=revision)))
        return [(commit.commit_id, commit.created_at) for commit in commits]

    def upload(self, files: Sequence[Outgoing], branch: str) -> list[CommitOperationAdd]:
        """Send the bytes of large files ahead of the commit that will name them.

        What the Hub has already is not sent again. A large file's local copy may go once this
        returns (`is_sent`); a small one is sent by the commit itself.
        """
        additions = [addition_of(file) for file in files]

        def send() -> None:
            with plain_errors(self.repo_id):
                # Nothing is ignored, whatever a .gitignore among the model's files says; and one
                # at a time, since what is sent at once shares one line anyway.
                self.client.api.preupload_lfs_files(
                    self.repo_id, additions, revision=branch, num_threads=1, gitignore_content=""
                )

        self._change(send)
        for addition in additions:
            # The client would leave out of any commit what this branch has already; the commit may
            # be put on another, and what is to be left out there is for `Change` to say.
            addition._remote_oid = None
        return additions

    def commit(self, change: Change, *, branch: str, parent: str) -> str:
        """Put a change on a branch, once, right after `parent`; return the commit.

        Raises:
            Moved: if something else has been put there meanwhile.
            CannotCopy: if a copy from another repo is not to be had; nothing has been changed.
            AccessError: once patience is at an end; nothing has been changed, as far as is known.
        """
        waiting = Waiting(self._patiences.commit, self.client.on_wait)
        while True:
            try:
                return self._commit_once(change, branch, parent)
            except TROUBLES as error:
                trouble = self._translate(error)
            try:
                made = self._found_made(change, branch, parent)
            except PissaError as error:
                if not error.retryable:
                    raise
                made = None  # not known; but a second try names the same parent, and so is refused
            if made is not None:
                return made
            waiting.after(trouble)

    def _translate(self, error: Exception) -> Trouble:
        trouble = self._writing().translate(error)
        trouble.error.__cause__ = error
        if status_of(error) == _STALE_PARENT:
            return replace(trouble, passing=True)
        return trouble

    def _commit_once(self, change: Change, branch: str, parent: str) -> str:
        copying = change.copies_from_elsewhere
        try:
            info = self.client.api.create_commit(
                self.repo_id,
                list(change.operations),
                commit_message=change.message,
                revision=branch,
                parent_commit=parent,
            )
        except (FileDuplicationError, EntryNotFoundError, ValueError) as error:
            if copying:
                raise CannotCopy(str(error)) from error
            raise self._refused(error) from error
        except HfHubHTTPError as error:
            if copying and _is_about_copying(error):
                raise CannotCopy(str(error)) from error
            raise
        return str(info.oid)

    def _found_made(self, change: Change, branch: str, parent: str) -> str | None:
        """Return the branch's head if the change is in it; None if it is still at the parent.

        Raises:
            Moved: if it is elsewhere.
        """
        there = self.state(branch)
        if there is None:
            raise Moved(f"{branch} is gone")
        if there.commit == parent:
            return None
        if change.is_made(there):
            return there.commit
        raise Moved(f"{branch} is at {there.commit}, not at {parent}")

    def _refused(self, error: Exception) -> PissaError:
        if isinstance(error.__cause__, BadRequestError):
            reason = " ".join(str(error).split())
            return NoWriteAccess(
                f"the Hub does not take the model card ({reason})",
                hint="correct the metadata of the source's README.md, then run the same again",
            )
        return self._writing().unavailable("did not answer as a Hub does", passing=False).error

    def _ask(self, work: Callable[[], Answer]) -> Answer:
        subject = self.client.subject(self.repo_id, None)
        return self.client.call(work, subject, self._patiences.transfer)

    def _change(self, work: Callable[[], object]) -> None:
        self.client.call(work, self._writing(), self._patiences.transfer)

    def _writing(self) -> Subject:
        return self.client.subject(self.repo_id, None, writing=True)


def _is_about_copying(error: HfHubHTTPError) -> bool:
    status = status_of(error)
    refused = status is not None and 400 <= status < 500 and status not in (401, 408, 429)
    return refused and str(error.response.url).endswith("/lfs-files/duplicate")
