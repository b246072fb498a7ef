"""A machine whose processes seal shards on the test Hub."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from hub.state import Hub
from hub_tools import OUT

from pissa_core.adapters.hub import HubClient, HubSink
from pissa_core.adapters.hub.sweeping import PREFIX
from pissa_core.ports import Seal
from pissa_core.refs import HubRef

SEALER = Path(__file__).with_name("sealer.py")
TESTS = SEALER.parents[1]


def wait_until(look: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not look():
        assert time.monotonic() < deadline, "nothing came of it"
        time.sleep(0.02)


@dataclass
class Machine:
    """A scratch folder that processes share, each with one shard to seal and a token of its own."""

    hub: Hub
    scratch: Path
    children: dict[str, subprocess.Popen[str]]

    def begin(self, shard: str) -> str:
        """Begin to seal a shard in a process; return its token."""
        token = self.hub.create_token("somebody")
        command = [sys.executable, str(SEALER), self.hub.endpoint, token, str(self.scratch), shard]
        path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
        env = os.environ | {"PYTHONPATH": path, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
        self.children[token] = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        return token

    def ends(self, token: str) -> None:
        """See a process end well."""
        out, err = self.children[token].communicate(timeout=60)
        assert out == "sealed\n", err

    def stop(self, token: str) -> None:
        """Stop a process, and see that it is."""
        self.children[token].send_signal(signal.SIGSTOP)
        stopped = psutil.Process(self.children[token].pid)
        wait_until(lambda: stopped.status() == psutil.STATUS_STOPPED)

    def waiting(self) -> int:
        return len(list(self.scratch.glob("d1/.sealing/*.ready")))

    def sealed(self, shards: list[str]) -> set[str]:
        return {shard for shard in shards if self.seal_of(shard) is not None}

    def seal_of(self, shard: str) -> Seal | None:
        client = HubClient(token=self.hub.create_token("somebody"), endpoint=self.hub.endpoint)
        return HubSink(HubRef(OUT), digest="d1", scratch=self.scratch, client=client).seal_of(shard)

    def titles(self) -> list[str]:
        """Titles of the commits on the staging branch, oldest first."""
        history = self.hub.repos[OUT].history(f"{PREFIX}d1")
        return [commit.title for commit in history][-3::-1]  # but for main's, and the beginning
