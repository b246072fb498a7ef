"""The kinds of jobs: what each one's steps do, a module a kind."""

from __future__ import annotations

from collections.abc import Mapping

from worker.kinds import base_to_pissa, pissa_to_base, pissa_to_lora, verify
from worker.kinds.telling import Kind

KINDS: Mapping[str, Kind] = {
    "base-to-pissa": base_to_pissa.KIND,
    "pissa-to-lora": pissa_to_lora.KIND,
    "pissa-to-base": pissa_to_base.KIND,
    "verify": verify.KIND,
}
