"""What the engine yields while it works; whoever iterates turns it into a bar, a log, a state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pissa_core.plan import Plan


@dataclass(frozen=True, slots=True)
class Planned:
    """The plan is made; nothing was read but headers."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class Waiting:
    """A shard waits for others to make room; said again and again, so that it can be left."""

    shard: str


@dataclass(frozen=True, slots=True)
class ShardStarted:
    """A shard begins; `resumed` matrices of an earlier attempt are already done."""

    shard: str
    matrices: int
    resumed: int


@dataclass(frozen=True, slots=True)
class MatrixDone:
    """A matrix is decomposed and written; `row` is its row in the manifest.

    `resumed` says that an earlier attempt did it and its checksums were found right.
    """

    shard: str
    row: Mapping[str, Any]
    nbytes: int
    seconds: float
    resumed: bool = False


@dataclass(frozen=True, slots=True)
class ShardSealed:
    """A shard and its factors are done and durable; `resumed`: they already were."""

    shard: str
    nbytes: int
    matrices: int
    resumed: bool = False


@dataclass(frozen=True, slots=True)
class Publishing:
    """All shards are sealed; the rest of the output is being written."""


@dataclass(frozen=True, slots=True)
class Published:
    """The result is visible at `ref`; `manifest` is what pissa_manifest.json says."""

    ref: str
    manifest: Mapping[str, Any]


Event = Planned | ShardStarted | MatrixDone | ShardSealed | Publishing | Published
