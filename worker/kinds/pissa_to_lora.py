"""`pissa-to-lora`: not there yet."""

from __future__ import annotations

from pissa_core.errors import InvalidRequest
from worker.holding import Hold
from worker.kinds.telling import Kind
from worker.store.tasks import Claim
from worker.wiring import Context


def _refuse(context: Context, claim: Claim, hold: Hold) -> None:
    raise InvalidRequest("pissa-to-lora is not there yet", hint="a later version will have it")


KIND = Kind(_refuse, _refuse, _refuse, _refuse)
