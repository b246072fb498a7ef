"""A call of the test Hub on its way from request to answer: who asks, and what they may."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hub.blobs import Blob, Bytes
from hub.body import Body
from hub.repos import Commit, Repo, Token
from hub.state import Hub, Seen


@dataclass
class Answer:
    """Status, headers and body of an answer; the body is a blob so that ranges cost no memory."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: Blob = field(default_factory=lambda: Bytes(b""))
    ranged: bool = False


class Refusal(Exception):
    """An answer that is an error, as the Hub words it."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def refused(refusal: Refusal) -> Answer:
    answer = as_json({"error": refusal.message}, refusal.status)
    answer.headers["X-Error-Message"] = refusal.message
    if refusal.code:
        answer.headers["X-Error-Code"] = refusal.code
    return answer


def as_json(value: Any, status: int = 200) -> Answer:
    return Answer(status, {"Content-Type": "application/json"}, Bytes(json.dumps(value).encode()))


@dataclass
class Call:
    """One request on its way through a route."""

    hub: Hub
    token: Token | None
    query: dict[str, str]
    body: Body
    seen: Seen

    def json(self) -> Any:
        """Read the body as JSON."""
        try:
            return json.loads(self.body.read())
        except ValueError as error:
            raise Refusal(400, "the body is no JSON") from error

    def repo(self, repo_id: str) -> Repo:
        """Return a repo that the token may see."""
        repo = self.hub.repos.get(repo_id)
        if repo is None or not self._sees(repo):
            status = 404 if self.token else 401
            raise Refusal(status, "Repository not found", "RepoNotFound")
        if repo.disabled:
            raise Refusal(403, "Access to this resource is disabled.")
        if self.token and repo_id in self.token.forbidden:
            raise Refusal(403, "the token lacks the permission")
        return repo

    def commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.resolve(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def check_content(self, repo: Repo) -> None:
        """Refuse the files of a gated repo to those who were not let in."""
        if repo.gated and not (self.token and self._is_member(repo)):
            message = f"Access to model {repo.id} is restricted."
            raise Refusal(403 if self.token else 401, message, "GatedRepo")

    def writable(self, repo_id: str) -> Repo:
        """Return a repo that the token may change."""
        repo = self.repo(repo_id)
        if self.token is None:
            raise Refusal(401, "Invalid username or password.")
        if not (self.token.may_write(repo_id) and self._is(repo.owner, *repo.writers)):
            raise Refusal(403, "You don't have the rights to write to this repository")
        return repo

    def _sees(self, repo: Repo) -> bool:
        return not repo.private or (self.token is not None and self._is_member(repo))

    def _is_member(self, repo: Repo) -> bool:
        return self._is(repo.owner, *repo.readers, *repo.writers)

    def _is(self, *names: str) -> bool:
        assert self.token is not None
        return bool({self.token.user, *self.token.orgs} & set(names))


Route = Callable[..., Answer]
