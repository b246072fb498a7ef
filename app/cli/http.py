"""The service as the client commands see it: JSON in, JSON out, problems as errors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx2

from app.cli.errors import ServiceUnreachable
from pissa_core.errors import InvalidRequest, PissaError, error_from

DEFAULT_URL = "http://127.0.0.1:8000"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0


class Service:
    """One connection to the service at PISSA_URL."""

    def __init__(self, url: str, *, api_key: str | None, hub_token: str | None) -> None:
        """Prepare to talk to `url`; nothing is sent yet.

        Raises:
            InvalidRequest: if `url` is no http address.
        """
        self.url = url.rstrip("/")
        self._hub_token = hub_token
        headers = {"Accept": "application/json"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        try:
            parsed = httpx2.URL(self.url)
            usable = parsed.scheme in ("http", "https") and bool(parsed.host)
            self._http = httpx2.Client(
                base_url=self.url + "/",
                headers=headers,
                # A proxy from the environment cannot reach this machine's loopback.
                trust_env=parsed.host not in LOOPBACK,
                timeout=httpx2.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            )
        except (httpx2.InvalidURL, ValueError, UnicodeError) as error:
            # A key with a line break or an accent lands here too, and must not be shown.
            raise InvalidRequest(
                "PISSA_URL or PISSA_API_KEY cannot be sent over HTTP",
                hint="check both for stray characters",
            ) from error
        if not usable:
            raise InvalidRequest(
                f"PISSA_URL is {url!r}, not an address of a service",
                hint=f"write it as {DEFAULT_URL}",
            )

    @classmethod
    def from_environment(cls) -> Service:
        """Read PISSA_URL, PISSA_API_KEY and HF_TOKEN."""
        return cls(
            os.environ.get("PISSA_URL") or DEFAULT_URL,
            api_key=os.environ.get("PISSA_API_KEY"),
            hub_token=os.environ.get("HF_TOKEN"),
        )

    def get(self, path: str, **params: str | int) -> dict[str, Any]:
        """GET a JSON object."""
        return self._json("GET", path, params=params)

    def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        with_hub_token: bool = False,
    ) -> dict[str, Any]:
        """POST a JSON object and return the answer.

        The Hub token goes only with what needs it: new jobs and resumed ones.
        """
        sent = dict(headers or {})
        if with_hub_token and self._hub_token:
            sent["X-Hub-Token"] = self._hub_token
        return self._json("POST", path, json=body, headers=sent)

    def delete(self, path: str) -> None:
        """DELETE what lies at `path`; nothing comes back."""
        with self._reachable():
            answer = self._http.delete(path)
        if answer.is_error:
            raise _problem(answer)

    @contextmanager
    def stream(self, path: str, *, start: int) -> Iterator[httpx2.Response]:
        """GET a file from byte `start` on; the answer is 206, or 200 with the whole file."""
        # No compression on the way: offsets must be offsets of the file.
        headers = {"Accept": "*/*", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        with self._reachable(), self._http.stream("GET", path, headers=headers) as answer:
            if answer.is_error:
                answer.read()
                raise _problem(answer)
            yield answer

    def _json(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        with self._reachable():
            answer = self._http.request(method, path, **request)
        if answer.is_error:
            raise _problem(answer)
        try:
            data = answer.json()
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise ServiceUnreachable(
                f"what answers at {self.url} is not a PiSSA service: {method} {path} gave status "
                f"{answer.status_code} and no JSON object",
                hint="check PISSA_URL",
            )
        return data

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except httpx2.TransportError as error:
            reason = str(error) or type(error).__name__
            raise ServiceUnreachable(
                f"no answer from the service at {self.url}: {reason}",
                hint="start one with `pissa serve`, or set PISSA_URL",
            ) from error


def job_path(job_id: str, *rest: str) -> str:
    """Return the path of a job's resource; the id is quoted, whatever was typed."""
    return "/".join(["v1/jobs", quote(job_id, safe=""), *rest])


def _problem(answer: httpx2.Response) -> PissaError:
    try:
        document = answer.json()
        code, detail = str(document["code"]), str(document["detail"])
    except (ValueError, KeyError, TypeError):
        return ServiceUnreachable(
            f"{answer.request.method} {answer.request.url.path} gave status "
            f"{answer.status_code} and no problem document",
            hint="check PISSA_URL; what answers there may not be a PiSSA service",
        )
    hint = document.get("hint")
    if code == "unauthorized" and not hint:
        hint = "set PISSA_API_KEY"
    return error_from(code, detail, str(hint) if hint else None)
