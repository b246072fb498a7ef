"""The one door to the Hub: the official client, with timeouts, bounded waiting and our errors.

The client's own defaults are not ours: it sets no timeout, its calls about a repo are not tried
again, and its retries wait as long as any server tells them to.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import httpx2
from huggingface_hub import HfApi, hf_hub_url, set_client_factory
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.hf_api import ModelInfo, RepoFile
from huggingface_hub.utils import (
    build_hf_headers,
    disable_progress_bars,
    get_session,
    hf_raise_for_status,
)
from huggingface_hub.utils._http import hf_request_event_hook

from pissa_core.adapters.hub.trouble import TROUBLES, Subject
from pissa_core.adapters.hub.waiting import OPENING, TRANSFER, Notice, Patience, Waiting
from pissa_core.errors import TokenInvalid

TIMEOUT = httpx2.Timeout(connect=10, read=30, write=60, pool=60)
"""Seconds; `read` is the longest silence, not the longest transfer."""

COMMIT_TIMEOUT = httpx2.Timeout(connect=10, read=120, write=60, pool=60)
"""Seconds for a commit, which the Hub may answer after a minute."""

PIECE = 8 << 30
"""Bytes asked for at a time: beyond 50 GB the Hub's storage answers only ranged requests."""

_PACE = 10_000  # bytes a second; a server that drips slower is left and asked again
_PACE_WINDOW_S = 30.0
_AGENT = {"user-agent": "pissa-service"}  # in place of one that lists this machine's software

_LISTED = 50_000  # beyond so many files the Hub's answer about a repo may not name all

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file at a commit: git's checksum of it, or the sha256 of a large one."""

    size: int
    blob_id: str | None
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Pinned:
    """A repo at one commit."""

    commit: str
    files: Mapping[str, HubFile]


class _Client(httpx2.Client):
    """An HTTP client for which "no timeout given" means ours; the Hub client gives None."""

    def build_request(
        self, method: str, url: Any, *, timeout: Any = None, **kwargs: Any
    ) -> httpx2.Request:
        """Build a request as usual, with our timeouts unless others are given."""
        ours = COMMIT_TIMEOUT if "/commit/" in str(url) and method == "POST" else TIMEOUT
        given = timeout if isinstance(timeout, (int, float)) else ours
        return super().build_request(method, url, timeout=given, **kwargs)


def _refuse_hidden_waits(response: httpx2.Response) -> None:
    """Raise where the Hub asks to wait: the client would sleep as long as told, unseen."""
    asked = "Retry-After" in response.headers and response.is_server_error
    if response.status_code == 429 or asked:
        response.read()
        hf_raise_for_status(response)


@cache
def _install() -> None:
    """Have the official client use `_Client`, once a process, and keep it from talking."""
    # Its warnings hold signed addresses of the storage, which are nobody else's to read.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    disable_progress_bars()
    set_client_factory(
        lambda: _Client(
            event_hooks={
                "request": [hf_request_event_hook],
                "response": [_refuse_hidden_waits],
            },
            follow_redirects=True,
            timeout=TIMEOUT,
        )
    )


class HubClient:
    """Calls to one Hub with one token; safe to use from several threads."""

    def __init__(
        self,
        *,
        token: str | None = None,
        endpoint: str | None = None,
        opening: Patience = OPENING,
        transfer: Patience = TRANSFER,
        on_wait: Notice | None = None,
    ) -> None:
        """Open no connection yet.

        Args:
            token: sent with every call; None leaves it to the client (``HF_TOKEN``, a login).
            endpoint: the Hub's address; None leaves it to the client (``HF_ENDPOINT``).
            opening: patience for calls about a repo.
            transfer: patience for data.
            on_wait: told of every pause that the Hub, or its absence, makes necessary.

        Raises:
            TokenInvalid: if `token` cannot be one.
        """
        if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
            raise TokenInvalid(
                "the Hub token holds characters that no token has",
                hint="pass it without spaces, quotes or line ends",
            )
        _install()
        self.endpoint = (endpoint or ENDPOINT).rstrip("/")
        self._headers = build_hf_headers(token=token, headers=_AGENT)
        self.api = HfApi(endpoint=self.endpoint, token=token, headers=_AGENT)
        self._opening, self._transfer = opening, transfer
        self.on_wait = on_wait

    def subject(
        self, repo_id: str, revision: str | None, *, pinned: bool = False, writing: bool = False
    ) -> Subject:
        """Name what a call is about, for the messages of its errors."""
        with_token = "authorization" in self._headers
        return Subject(repo_id, revision, self.endpoint, with_token, pinned, writing)

    def call(self, work: Callable[[], T], subject: Subject, patience: Patience | None = None) -> T:
        """Run one call that may be made twice; try again while that may help."""
        waiting = Waiting(patience or self._opening, self.on_wait)
        while True:
            try:
                return work()
            except TROUBLES as error:
                trouble = subject.translate(error)
                trouble.error.__cause__ = error
                waiting.after(trouble)
            except (ValueError, TypeError, KeyError) as error:
                # The answer is no JSON, or not the JSON of a Hub: a proxy's or a login page.
                trouble = subject.unavailable("did not answer as a Hub does", passing=False)
                raise trouble.error from error

    def post(self, path: str, body: object) -> httpx2.Response:
        """Send JSON to a route of the Hub that the official client has no public call for."""
        return get_session().post(f"{self.endpoint}{path}", json=body, headers=self._headers)

    def pin(self, repo_id: str, revision: str | None, patience: Patience | None = None) -> Pinned:
        """Return a model repo's commit and files, once reading them is known to be allowed.

        Raises:
            AccessError: any of its kinds.
        """
        subject = self.subject(repo_id, revision)
        info = self.call(
            lambda: self.api.model_info(repo_id, revision=revision, files_metadata=True),
            subject,
            patience,
        )
        if info.sha is None:
            raise subject.unavailable(f"named no commit of {repo_id}").error
        if info.gated:
            # Anybody may list a gated repo; who may read it is another question.
            self.call(lambda: self.api.auth_check(repo_id), subject, patience)
        if len(info.siblings or ()) < _LISTED:
            return Pinned(info.sha, _files_of(info))
        return Pinned(info.sha, self.call(lambda: self._tree(repo_id, info.sha), subject, patience))

    def _tree(self, repo_id: str, commit: str | None) -> dict[str, HubFile]:
        tree = self.api.list_repo_tree(repo_id, revision=commit, recursive=True)
        return {
            entry.path: HubFile(
                entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs is not None else None
            )
            for entry in tree
            if isinstance(entry, RepoFile)
        }

    def stream(
        self, repo_id: str, commit: str, path: str, *, start: int, stop: int, size: int
    ) -> Iterator[bytes]:
        """Yield the bytes ``[start, stop)`` of a file of `size` bytes at a commit.

        A connection that breaks, stalls or drips is opened again where it was left.

        Raises:
            AccessError: any of its kinds, once patience is at an end.
        """
        subject = self.subject(repo_id, commit, pinned=True)
        url = hf_hub_url(repo_id, path, revision=commit, endpoint=self.endpoint)
        waiting = Waiting(self._transfer, self.on_wait)
        position = start
        while position < stop:
            end = min(stop, position + PIECE)
            try:
                for chunk in self._connect(url, position, end, size, subject):
                    position += len(chunk)
                    waiting.received(len(chunk))
                    yield chunk
            except TROUBLES as error:
                trouble = subject.translate(error)
                trouble.error.__cause__ = error
                waiting.after(trouble)
            else:
                if position < end:
                    waiting.after(subject.unavailable(f"stopped sending {path} at byte {position}"))

    def _connect(
        self, url: str, start: int, stop: int, size: int, subject: Subject
    ) -> Iterator[bytes]:
        """Open one connection and yield what it brings of ``[start, stop)``, perhaps not all."""
        headers = {**self._headers, "Accept-Encoding": "identity"}
        if (start, stop) != (0, size):
            headers["Range"] = f"bytes={start}-{stop - 1}"
        pace = _Pace()
        with get_session().stream("GET", url, headers=headers) as response:
            if response.is_error:
                response.read()
            hf_raise_for_status(response)
            _check_total(response, size, subject)
            # A server that ignores ranges sends the file from its beginning.
            position = start if response.status_code == 206 else 0
            for chunk in response.iter_bytes():
                wanted = chunk[max(start - position, 0) : max(stop - position, 0)]
                position += len(chunk)
                if wanted:
                    yield wanted
                if position >= stop or pace.too_slow(len(chunk)):
                    return


class _Pace:
    """Notices a connection that is alive and brings next to nothing."""

    def __init__(self) -> None:
        self._since, self._received = time.monotonic(), 0

    def too_slow(self, nbytes: int) -> bool:
        """Count what came; say whether the last window brought less than it must."""
        self._received += nbytes
        elapsed = time.monotonic() - self._since
        if elapsed < _PACE_WINDOW_S:
            return False
        slow = self._received < _PACE * elapsed
        self._since, self._received = time.monotonic(), 0
        return slow


def _check_total(response: httpx2.Response, size: int, subject: Subject) -> None:
    """Refuse a file that has no longer the size it was listed with."""
    if response.status_code == 206:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        encoded = response.headers.get("Content-Encoding", "identity") != "identity"
        total = "" if encoded else response.headers.get("Content-Length", "")
    if total.isdigit() and int(total) != size:
        raise subject.changed(f"a file listed with {size} bytes now has {total}")


def _files_of(info: ModelInfo) -> dict[str, HubFile]:
    return {
        entry.rfilename: HubFile(
            entry.size or 0, entry.blob_id, entry.lfs.sha256 if entry.lfs is not None else None
        )
        for entry in info.siblings or ()
    }
