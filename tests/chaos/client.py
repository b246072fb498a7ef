"""A patient client of the API: it asks again while a part of the service is away."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx2
from hubrepo import TOKEN

PATIENCE_S = 120.0
FINAL = ("succeeded", "failed", "cancelled")


class Client:
    """Requests that are sent again until they are answered; 503 is no answer."""

    def __init__(self, url: str) -> None:
        headers = {"X-Hub-Token": TOKEN}
        self._http = httpx2.Client(base_url=url, timeout=30, headers=headers)

    def ask(self, method: str, path: str, **fields: Any) -> httpx2.Response:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                answer = self._http.request(method, path, **fields)
            except httpx2.TransportError:
                answer = None
            if answer is not None and answer.status_code != 503:
                return answer
            assert time.monotonic() < deadline, f"no answer to {method} {path}"
            time.sleep(0.1)

    def try_once(self, method: str, path: str, **fields: Any) -> httpx2.Response | None:
        try:
            answer = self._http.request(method, path, **fields)
        except httpx2.TransportError:
            return None
        return None if answer.status_code == 503 else answer

    def submit(self, body: dict[str, Any], key: str) -> str:
        """Submit with an Idempotency-Key, so that asking twice is asking once."""
        answer = self.ask("POST", "/v1/jobs", json=body, headers={"Idempotency-Key": key})
        assert answer.status_code in (202, 200), answer.text
        return str(answer.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        answer = self.ask("GET", f"/v1/jobs/{job_id}")
        assert answer.status_code == 200, (job_id, answer.text)
        found: dict[str, Any] = answer.json()
        return found

    def events(self, job_id: str) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        after: str | None = ""
        while after is not None:
            params = {"after": after}
            page = self.ask("GET", f"/v1/jobs/{job_id}/events", params=params).json()
            if not page["events"]:
                break
            events += page["events"]
            after = page["next"]
        return events

    def close(self) -> None:
        self._http.close()


class Follower:
    """Reads a job's stream in a thread, going on by Last-Event-ID whenever it breaks off."""

    def __init__(self, url: str, job_id: str) -> None:
        self.job_id = job_id
        self.seen: list[str] = []
        self.broken = 0
        self._url = url
        self._open = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def caught_up(self, last: str) -> bool:
        return bool(self.seen) and self.seen[-1] == last

    def end(self) -> None:
        self._done.set()
        self._thread.join(40)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        with httpx2.Client(base_url=self._url, timeout=httpx2.Timeout(10, read=20)) as http:
            while not self._done.is_set():
                try:
                    self._read(http)
                except httpx2.TransportError:
                    self.broken += self._open
                self._open = False
                self._done.wait(0.2)

    def _read(self, http: httpx2.Client) -> None:
        headers = {"Accept": "text/event-stream"}
        if self.seen:
            headers["Last-Event-ID"] = self.seen[-1]
        with http.stream("GET", f"/v1/jobs/{self.job_id}/events", headers=headers) as answer:
            if answer.status_code != 200:
                return
            self._open = True
            for line in answer.iter_lines():
                # An event cut off before its last line is not one that was seen.
                if line.startswith("data: "):
                    self.seen.append(json.loads(line[6:])["id"])
                if self._done.is_set():
                    return
