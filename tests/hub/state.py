"""The state of the test Hub: its repos and tokens, its faults, and what it was asked."""

from __future__ import annotations

import re
import secrets
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub.blobs import Blob
from hub.faults import Faults
from hub.repos import Repo, Token, files_in
from hub.uploads import Uploads


@dataclass
class Seen:
    """One request that was answered: what was asked for, and how many bytes of body went by.

    Attributes:
        subject: what the bytes belong to: ORG/NAME/PATH coming down, a checksum going up.
    """

    method: str
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    status: int = 0
    sent: int = 0
    received: int = 0
    subject: str = ""


class Hub:
    """A running Hub: `endpoint`, its repos and tokens, its faults, and what it was asked.

    Attributes:
        page: entries on a page of a tree.
        uploads: large files that were sent, and `uploads.finished`: how often, by checksum.
        cross_repo: whether large files can be copied from repo to repo.
        commits: (repo, branch) of each commit that was sent, also where the answer went astray.
    """

    def __init__(
        self,
        *,
        page: int = 1000,
        folder: Path | None = None,
        part_size: int = 64 << 20,
        swallow_from: int | None = None,
        cross_repo: bool = False,
    ) -> None:
        """Make a Hub that is not running.

        Args:
            page: entries on a page of a tree.
            folder: where uploaded large files go; None takes a temporary one.
            part_size: larger files are sent in parts of so many bytes.
            swallow_from: files of so many bytes are hashed and counted, not kept.
            cross_repo: whether large files can be copied from repo to repo.
        """
        self.page = page
        self.cross_repo = cross_repo
        self.uploads = Uploads(folder, part_size, swallow_from)
        self.commits: list[tuple[str, str]] = []
        self.lock = threading.RLock()
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

    def sent_bytes(self, subject: str = "") -> int:
        """Bytes sent so far, of all bodies or of one ORG/NAME/PATH."""
        return sum(seen.sent for seen in list(self.seen) if subject in ("", seen.subject))

    def counts(self) -> dict[str, Any]:
        """Return bytes down and up, whole uploads by checksum, and commits, so far."""
        down, up = Counter[str](), Counter[str]()
        for seen in list(self.seen):
            down[seen.subject] += seen.sent
            up[seen.subject] += seen.received
        return {
            "sent": down,
            "received": up,
            "uploads": self.uploads.finished,
            "commits": list(self.commits),
            "requests": len(self.seen),
        }

    def received_bytes(self, subject: str = "") -> int:
        """Bytes of bodies received so far, of all or of one large file by checksum."""
        return sum(seen.received for seen in list(self.seen) if subject in ("", seen.subject))
