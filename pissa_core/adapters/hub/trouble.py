"""What the Hub or the way to it answers when something is wrong, in our words.

Everything that the client raises is translated here and nowhere else, from status and headers,
never from the wording of a message. No message holds a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx2
from huggingface_hub.errors import DisabledRepoError, HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import parse_ratelimit_headers

from pissa_core.adapters.hub.waiting import Trouble
from pissa_core.errors import (
    AccessError,
    DiskFull,
    GatedRepo,
    HubUnavailable,
    NoReadAccess,
    NoWriteAccess,
    PissaError,
    RateLimited,
    RepoNotFound,
    RevisionNotFound,
    SourceChanged,
    TokenInvalid,
)

TROUBLES = (httpx2.HTTPError, httpx2.InvalidURL, OfflineModeIsEnabled)
"""What the client raises; `HfHubHTTPError` is an `httpx2.HTTPError`."""

_PASSING = {408, 425, 500, 502, 503, 504}
_NO_ROOM = {402, 413, 507}
_LONGEST_WORDS = 200


@dataclass(frozen=True, slots=True)
class Subject:
    """What a call was about, for messages: repo, revision, Hub, and whether a token was sent."""

    repo_id: str
    revision: str | None
    endpoint: str
    with_token: bool
    pinned: bool = False
    writing: bool = False

    @property
    def host(self) -> str:
        """The Hub's host and port, without the password that an address may hold besides."""
        address = urlsplit(self.endpoint).netloc or self.endpoint or "(no address)"
        return address.rpartition("@")[2]

    @property
    def site(self) -> str:
        """The Hub's address as a person may open it."""
        return f"{urlsplit(self.endpoint).scheme}://{self.host}"

    def translate(self, error: Exception) -> Trouble:
        """Say in our words what one of `TROUBLES` means."""
        if isinstance(error, HfHubHTTPError):
            return self._from_answer(error)
        if isinstance(error, OfflineModeIsEnabled):
            return Trouble(
                HubUnavailable(
                    f"{self.repo_id} is on the Hub, and the Hub client is set to offline",
                    hint="unset HF_HUB_OFFLINE, or name a local folder",
                )
            )
        passing = isinstance(
            error, (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
        )
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        return self.unavailable(f"cannot be reached ({reason})", passing=passing)

    def unavailable(
        self, what: str, *, passing: bool = True, pause_s: float | None = None
    ) -> Trouble:
        """Say that the Hub is away or answers nonsense."""
        return Trouble(
            HubUnavailable(
                f"the Hub at {self.host} {what}",
                hint="check the connection and HF_ENDPOINT, then run the same again: it resumes",
            ),
            passing,
            pause_s,
        )

    def changed(self, what: str) -> SourceChanged:
        """Say that the pinned commit no longer holds what it held."""
        return SourceChanged(
            f"{self.repo_id} changed while it was being read: {what}",
            hint="run again to convert the repo as it is now",
        )

    def gone(self) -> RepoNotFound:
        """Say that a repo that was there is not."""
        return RepoNotFound(
            f"{self.repo_id} was there when this began, and the Hub at {self.host} has it no more, "
            "or no longer shows it to this token",
            hint="if it was removed or renamed on purpose, run the same again: it is made anew",
        )

    def not_allowed(self, says: str = "") -> NoWriteAccess:
        """Say that the repo may not be written."""
        who = "with this token" if self.with_token else "without a token"
        return NoWriteAccess(
            f"the Hub forbids writing to {self.repo_id} {who}{says}",
            hint=f"make a token that may write to it at {self.site}/settings/tokens and give it as "
            "HF_TOKEN, or as X-Hub-Token for a job",
        )

    def _from_answer(self, error: HfHubHTTPError) -> Trouble:
        response = error.response
        code, status = response.headers.get("X-Error-Code"), response.status_code
        if code == "GatedRepo":
            return Trouble(self._gated())
        if code in ("RevisionNotFound", "EntryNotFound"):
            return Trouble(self._not_there(code))
        if status == 429:
            return self._rate_limited(response)
        if status in _PASSING:
            return self.unavailable(
                f"answered with status {status}", pause_s=_asked_pause_s(response)
            )
        if self.writing and status in (401, 402, 403, 413, 507):
            return Trouble(self._not_written(status, response))
        if code == "RepoNotFound" or status == 404 or (status == 401 and not self.with_token):
            return Trouble(self._no_repo())
        if status == 401:
            return Trouble(self._token_invalid())
        if status == 403:
            return Trouble(self._forbidden(isinstance(error, DisabledRepoError)))
        if status == 416:
            return Trouble(self.changed("a file is shorter than it was"))
        return self.unavailable(f"answered with status {status}", passing=False)

    def _gated(self) -> GatedRepo:
        who = "the token's account has not been let in" if self.with_token else "no token was given"
        return GatedRepo(
            f"{self.repo_id} is gated, and {who}",
            hint=f"accept its terms at {self.site}/{self.repo_id}, then run again with a token "
            "of that account (HF_TOKEN, or X-Hub-Token for a job)",
        )

    def _not_written(self, status: int, response: httpx2.Response) -> PissaError:
        words = " ".join(response.headers.get("X-Error-Message", "").split())[:_LONGEST_WORDS]
        says = f" (it says: {words})" if words else ""
        if status in _NO_ROOM:
            return DiskFull(
                f"the Hub has no room for {self.repo_id}{says}",
                hint=f"free some storage, or see {self.site}/settings/billing; then run the same "
                "again: it resumes",
            )
        if status == 401 and self.with_token:
            return self._token_invalid()
        return self.not_allowed(says)

    def _not_there(self, code: str) -> AccessError:
        if self.pinned or code == "EntryNotFound":
            what = "a file" if code == "EntryNotFound" else "the commit"
            return self.changed(f"{what} that was there is gone ({self.revision})")
        return RevisionNotFound(
            f"{self.repo_id} has no branch, tag or commit {self.revision!r}",
            hint="leave @revision out for the default branch; a slash in it is written %2F",
        )

    def _rate_limited(self, response: httpx2.Response) -> Trouble:
        pause_s = _asked_pause_s(response)
        asked = f"; it asks to wait {pause_s:.0f} s" if pause_s is not None else ""
        return Trouble(
            RateLimited(
                f"the Hub at {self.host} takes no more requests for now{asked}",
                hint="run the same again later: it resumes"
                + ("" if self.with_token else "; with a token (HF_TOKEN) the limit is higher"),
            ),
            passing=True,
            pause_s=pause_s,
        )

    def _no_repo(self) -> RepoNotFound:
        why = "this token cannot see it" if self.with_token else "no token was given"
        return RepoNotFound(
            f"the Hub at {self.host} has no model {self.repo_id}, or it is private and {why}",
            hint="check the spelling (org/name); for a private model give a token that can read it "
            "(HF_TOKEN, or X-Hub-Token for a job); a local folder begins with ./ or /",
        )

    def _token_invalid(self) -> TokenInvalid:
        return TokenInvalid(
            f"the Hub at {self.host} does not accept the token: it is wrong, expired or revoked",
            hint=f"make a new one at {self.site}/settings/tokens",
        )

    def _forbidden(self, disabled: bool) -> NoReadAccess:
        if disabled:
            return NoReadAccess(f"the Hub has disabled access to {self.repo_id}")
        return NoReadAccess(
            f"the Hub forbids reading {self.repo_id} "
            + ("with this token" if self.with_token else "without a token"),
            hint="a fine-grained token needs the permission to read this repo's contents",
        )


def _asked_pause_s(response: httpx2.Response) -> float | None:
    """Seconds the Hub asks to wait: its rate limit's reset, or Retry-After in seconds."""
    limit = parse_ratelimit_headers(response.headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    after = response.headers.get("Retry-After", "").strip()
    return float(after) if after.isdigit() else None
