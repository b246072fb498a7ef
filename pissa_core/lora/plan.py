"""Everything about one conversion, decided from headers: which pairs, what becomes of them.

A plan is data: frozen, printable, serialisable. The work needs it, both sources and a sink.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pissa_core.layout.header import TensorInfo
from pissa_core.lora.adapter import WEIGHTS, Pair
from pissa_core.spec import LoraOptions

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Update:
    """One module: its trained and its initial factors, ΔW = scaling · (B A − B₀ A₀).

    Attributes:
        bound: the largest rank the result may have; with a tolerance it may have less.
    """

    trained: Pair
    initial: Pair
    bound: int

    @property
    def module(self) -> str:
        """The module's path, as PEFT names it."""
        return self.trained.module

    @property
    def exact_rank(self) -> int:
        """2r, the rank at which nothing is lost."""
        return 2 * self.trained.rank

    @property
    def dtype(self) -> str:
        """The dtype that holds all four factors without loss."""
        pairs = (self.trained, self.initial)
        dtypes = {tensor.dtype for pair in pairs for tensor in (pair.a, pair.b)}
        return dtypes.pop() if len(dtypes) == 1 else "F32"

    @property
    def nbytes(self) -> int:
        """Bytes of all four factors."""
        return self.trained.nbytes + self.initial.nbytes


@dataclass(frozen=True, slots=True)
class WorkFile:
    """The one file that the work makes, and the bytes that its progress counts."""

    path: str
    size: int


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """One conversion: two adapters in, one adapter out.

    Attributes:
        source: the trained adapter, pinned.
        initial: the initial one, pinned.
        base: the original model as the result's config names it.
        base_revision: its commit.
        residual: the residual model, where its manifest was found.
        trained_config: the trained adapter's config.
        config: the options, with defaults.
        carried: tensors of the trained adapter that are taken over as they are.
        left_out: keys of the trained adapter that are not.
        notes: what was found and what could not be checked.
        peak_memory: estimated bytes of memory, beyond what the program itself needs.
    """

    source: str
    commit: str | None
    initial: str
    initial_commit: str | None
    base: str | None
    base_revision: str | None
    residual: str | None
    trained_config: Mapping[str, Any]
    config: Mapping[str, Any]
    updates: tuple[Update, ...]
    carried: tuple[TensorInfo, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    peak_memory: int

    @property
    def options(self) -> LoraOptions:
        """The options as they were read."""
        return LoraOptions.model_validate(dict(self.config))

    @property
    def matrices(self) -> tuple[Update, ...]:
        """What is counted as done one by one."""
        return self.updates

    @property
    def shards(self) -> tuple[WorkFile, ...]:
        """The result's one file of weights; its size counts what is read."""
        read = sum(update.nbytes for update in self.updates)
        return (WorkFile(WEIGHTS, read + sum(tensor.nbytes for tensor in self.carried)),)

    def to_json(self) -> str:
        """Serialise; `from_json` gives an equal plan."""
        return json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, text: str | bytes) -> LoraPlan:
        """Read what `to_json` wrote."""
        data = json.loads(text)
        if data.pop("schema") != SCHEMA:
            raise ValueError("the plan was written by another version")
        data["updates"] = tuple(
            Update(_pair(each["trained"]), _pair(each["initial"]), each["bound"])
            for each in data["updates"]
        )
        data["carried"] = tuple(_tensor(each) for each in data["carried"])
        for field in ("left_out", "notes"):
            data[field] = tuple(data[field])
        return cls(**data)


def _pair(data: Mapping[str, Any]) -> Pair:
    return Pair(data["module"], _tensor(data["a"]), _tensor(data["b"]), data["scaling"])


def _tensor(data: Mapping[str, Any]) -> TensorInfo:
    return TensorInfo(**{**data, "shape": tuple(data["shape"])})
