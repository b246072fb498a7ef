"""Planning in a process of its own, which takes transformers and PEFT with it when it ends.

Planning needs both libraries for a few seconds, and they would stay in memory (over 100 MB) and
cost their import time (4 to 5 s) in series with torch's. The child reads one line of JSON from
stdin and answers with one on stdout; that stdin closes tells it that the parent has died.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from pissa_core.errors import OutOfMemory, PissaError, error_from
from pissa_core.plan import Plan
from pissa_core.refs import parse_ref
from pissa_core.spec import PissaConfig, parse_config


@dataclass(frozen=True, slots=True)
class Pending:
    """A plan that is being made; the child lives until `planning` ends."""

    child: subprocess.Popen[bytes]
    log: IO[bytes]

    def result(self) -> Plan:
        """Wait for the plan.

        Raises:
            PissaError: whatever the planner met, by its code.
        """
        assert self.child.stdout is not None
        answer = self.child.stdout.read()
        status = self.child.wait()
        if not answer:
            raise self._crash(status)
        data = json.loads(answer)
        if "error" in data:
            raise error_from(**data["error"])
        return Plan.from_json(data["plan"])

    def _crash(self, status: int) -> PissaError:
        if status == -9:
            return OutOfMemory(
                "the planning process was killed, most likely for want of memory",
                hint="planning takes about 1 GB, whatever the model's size",
            )
        self.log.seek(0)
        said = self.log.read().decode(errors="replace").strip().splitlines()
        last = said[-1] if said else "it said nothing"
        return PissaError(f"the planning process ended with status {status}: {last}")


@contextmanager
def planning(
    model: str,
    config: PissaConfig,
    *,
    slots: int | None = None,
    memory_budget: int | None = None,
    debug: bool = False,
) -> Iterator[Pending]:
    """Begin to plan in a child process; leaving the block ends the child if it still runs."""
    asked = {
        "model": model,
        "config": config.model_dump(mode="json"),
        "slots": slots,
        "memory_budget": memory_budget,
    }
    with tempfile.TemporaryFile() as log:
        # A process group of its own: Ctrl-C is for the parent, which then ends the child.
        child = subprocess.Popen(
            [sys.executable, "-m", "app.cli.planner"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if debug else log,
            process_group=0,
        )
        with child:
            try:
                assert child.stdin is not None
                child.stdin.write(json.dumps(asked).encode() + b"\n")
                child.stdin.flush()
                yield Pending(child, log)
            finally:
                child.kill()


def plan_in_child(
    model: str,
    config: PissaConfig,
    *,
    slots: int | None = None,
    memory_budget: int | None = None,
    debug: bool = False,
) -> Plan:
    """Plan and wait for it."""
    with planning(model, config, slots=slots, memory_budget=memory_budget, debug=debug) as pending:
        return pending.result()


def main() -> None:
    """Be the child: read what to plan, answer with the plan or the error."""
    answer_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    asked = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with answer_to:
        json.dump(_answer(asked), answer_to)
    # The libraries' own clearing up takes a second, and nobody waits for anything of theirs.
    os._exit(0)


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"plan": _make(asked).to_json()}
    except PissaError as error:
        traceback.print_exc()
        return {"error": error.as_dict()}
    except MemoryError:
        return {"error": OutOfMemory("memory ran out while planning").as_dict()}


def _make(asked: dict[str, Any]) -> Plan:
    from pissa_core.adapters import open_source
    from pissa_core.planning import make_plan

    limits = {key: asked[key] for key in ("slots", "memory_budget") if asked[key] is not None}
    source = open_source(parse_ref(asked["model"]))
    return make_plan(source, parse_config(asked["config"]), **limits)


def _end_with_parent() -> None:
    while sys.stdin.buffer.read(1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
