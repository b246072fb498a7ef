"""Planning in a process of its own, which takes transformers and PEFT with it when it ends.

Planning needs both libraries for a few seconds, and they would stay in memory (over 100 MB) and
cost their import time (2 to 4 s) in series with torch's. The child is `app.planning`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from app.cli.child import Child, child
from pissa_core.errors import OutOfMemory, PissaError, error_from
from pissa_core.plan import Plan
from pissa_core.spec import PissaConfig


@dataclass(frozen=True, slots=True)
class Pending:
    """A plan that is being made; the child lives until `planning` ends."""

    child: Child

    def result(self) -> Plan:
        """Wait for the plan.

        Raises:
            PissaError: whatever the planner met, by its code.
        """
        return Plan.from_json(self.text())

    def text(self) -> str:
        """Wait for the plan and return it as it was written, whatever its kind."""
        process = self.child.process
        assert process.stdout is not None
        answer = process.stdout.read()
        status = process.wait()
        if not answer:
            raise self._crash(status)
        data = json.loads(answer)
        if "error" in data:
            raise error_from(**data["error"])
        return str(data["plan"])

    def _crash(self, status: int) -> PissaError:
        if status == -9:
            return OutOfMemory(
                "the planning process was killed, most likely for want of memory",
                hint="planning takes about 1 GB, whatever the model's size",
            )
        self.child.log.seek(0)
        said = self.child.log.read().decode(errors="replace").strip().splitlines()
        last = said[-1] if said else "it said nothing"
        return PissaError(f"the planning process ended with status {status}: {last}")


@contextmanager
def planning(
    model: str,
    config: PissaConfig,
    *,
    debug: bool = False,
    **limits: int | str | None,
) -> Iterator[Pending]:
    """Begin to plan in a child process; leaving the block ends the child if it still runs.

    `limits` are those of `make_plan`; None leaves one to it.
    """
    asked = {"model": model, "config": config.model_dump(mode="json")}
    with asking(asked, debug=debug, **limits) as pending:
        yield pending


@contextmanager
def asking(
    asked: Mapping[str, object], *, debug: bool = False, **limits: int | str | None
) -> Iterator[Pending]:
    """Begin to plan work of any kind in a child process, which ends with the block."""
    given = {name: limit for name, limit in limits.items() if limit is not None}
    question = json.dumps({**asked, "limits": given})
    with child(debug=debug) as asked_one:
        stdin = asked_one.process.stdin
        assert stdin is not None
        with suppress(BrokenPipeError):  # it ended before it was asked: its status says why
            stdin.write(question.encode() + b"\n")
            stdin.flush()
        yield Pending(asked_one)


def plan_in_child(
    model: str,
    config: PissaConfig,
    *,
    debug: bool = False,
    **limits: int | str | None,
) -> Plan:
    """Plan and wait for it."""
    with planning(model, config, debug=debug, **limits) as pending:
        return pending.result()
