"""The state of the test Hub: its repos and tokens, its faults, and what it was asked."""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub.faults import Faults
from hub.repos import Blob, Repo, Token, files_in


@dataclass
class Seen:
    """One request that was answered: what was asked for, and how many bytes of body went out."""

    method: str
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    status: int = 0
    sent: int = 0


class Hub:
    """A running Hub: `endpoint`, its repos and tokens, its faults, and what it was asked."""

    def __init__(self, *, page: int = 1000) -> None:
        self.page = page
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, Token] = {}
        self.faults = Faults()
        self.seen: list[Seen] = []
        self.ended = threading.Event()
        self.endpoint = ""
        self.storage = ""
        self.blobs: dict[str, Blob] = {}

    def create_repo(
        self,
        repo_id: str,
        folder: Path | None = None,
        *,
        files: Mapping[str, Blob | bytes | Path] | None = None,
        private: bool = False,
        gated: bool = False,
    ) -> Repo:
        """Make a repo whose first commit holds a folder's files, or the files given."""
        repo = self.repos[repo_id] = Repo(repo_id, private=private, gated=gated)
        contents: dict[str, Any] = dict(files_in(folder)) if folder else {}
        repo.commit({**contents, **(files or {})}, title="initial commit")
        return repo

    def create_token(self, user: str, **kind: Any) -> str:
        """Make a token of a user; see `Token` for its kinds."""
        name = f"hf_{secrets.token_hex(16)}"
        self.tokens[name] = Token(user, **kind)
        return name

    def requests(self, path: str = "", *, method: str | None = None) -> list[Seen]:
        """Requests so far whose path matches a regular expression."""
        return [
            seen
            for seen in list(self.seen)
            if re.search(path, seen.path) and method in (None, seen.method)
        ]

    def sent_bytes(self) -> int:
        """Bytes of all bodies so far."""
        return sum(seen.sent for seen in list(self.seen))
