"""layout + targets + config → Plan: what will happen to every tensor, decided before it does.

A plan is data: frozen, printable, serialisable. A shard worker needs the plan, a source and a
sink, and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Matrix:
    """One target: where its tensor lies, and what becomes of it.

    Attributes:
        module: path in the model as PEFT names it, ``model.layers.0.self_attn.q_proj``.
        tensor: key in the checkpoint, which may differ from ``module + ".weight"``.
        shape: as stored; (out, in) for Linear, (in, out) for a Conv1D (`transposed`).
        start: first byte of the tensor's data, counted from the start of the shard file.
        key_a, key_b: PEFT's keys of the factors, ``base_model.model.….lora_A.weight``.
    """

    module: str
    tensor: str
    shard: str
    dtype: str
    shape: tuple[int, int]
    start: int
    stop: int
    rank: int
    scaling: float
    transposed: bool
    key_a: str
    key_b: str

    @property
    def out_features(self) -> int:
        """m: rows of W as PEFT multiplies it."""
        return self.shape[1] if self.transposed else self.shape[0]

    @property
    def in_features(self) -> int:
        """n: columns of W as PEFT multiplies it."""
        return self.shape[0] if self.transposed else self.shape[1]


@dataclass(frozen=True, slots=True)
class CarriedTensor:
    """A tensor that the adapter stores whole (`modules_to_save`), as it is in the checkpoint."""

    key: str
    tensor: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something that was asked for and cannot be converted correctly, and why."""

    name: str
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One file of weights: its size and its targets, in the order of their offsets."""

    path: str
    size: int
    matrices: tuple[Matrix, ...]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the work will cost, in bytes; the formulas stand in docs/ARCHITECTURE.md."""

    read: int
    written: int
    adapter: int
    peak_memory: int
    peak_disk: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything decided: nothing below looks at headers, PEFT or the model's class again."""

    source: str
    commit: str | None
    model_class: str | None
    names_from: str
    config: Mapping[str, Any]
    adapter_config: Mapping[str, Any]
    shards: tuple[ShardPlan, ...]
    carried: tuple[CarriedTensor, ...]
    index: str | None
    side_files: tuple[str, ...]
    left_out: tuple[str, ...]
    refused: tuple[Refusal, ...]
    estimate: Estimate

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Every target, shard by shard in the order of offsets."""
        return tuple(matrix for shard in self.shards for matrix in shard.matrices)

    @property
    def trainable_parameters(self) -> int:
        """Entries of all factors and carried tensors."""
        factors = sum(m.rank * (m.shape[0] + m.shape[1]) for m in self.matrices)
        return factors + sum(_count(tensor.shape) for tensor in self.carried)

    def public(self) -> dict[str, Any]:
        """Return the plan as `pissa plan --json` and ``POST /v1/plans`` show it."""
        return {
            "source": self.source,
            "commit": self.commit,
            "model_class": self.model_class,
            "names_from": self.names_from,
            "matrices": [_public_matrix(matrix) for matrix in self.matrices],
            "refused": [dataclasses.asdict(refusal) for refusal in self.refused],
            "left_out": list(self.left_out),
            "bytes": {
                "read": self.estimate.read,
                "written": self.estimate.written,
                "adapter": self.estimate.adapter,
            },
            "peak_memory_bytes": self.estimate.peak_memory,
            "peak_disk_bytes": self.estimate.peak_disk,
            "trainable_parameters": self.trainable_parameters,
        }

    def to_json(self) -> str:
        """Serialise; `from_json` gives an equal plan."""
        return json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Read what `to_json` wrote."""
        data = json.loads(text)
        if data.pop("schema") != SCHEMA:
            raise ValueError("the plan was written by another version")
        data["shards"] = tuple(
            ShardPlan(
                path=shard["path"],
                size=shard["size"],
                matrices=tuple(
                    Matrix(**{**m, "shape": tuple(m["shape"])}) for m in shard["matrices"]
                ),
            )
            for shard in data["shards"]
        )
        data["carried"] = tuple(
            CarriedTensor(**{**t, "shape": tuple(t["shape"])}) for t in data["carried"]
        )
        data["refused"] = tuple(Refusal(**r) for r in data["refused"])
        data["estimate"] = Estimate(**data["estimate"])
        for field in ("side_files", "left_out"):
            data[field] = tuple(data[field])
        return cls(**data)


def _public_matrix(matrix: Matrix) -> dict[str, Any]:
    return {
        "module": matrix.module,
        "tensor": matrix.tensor,
        "shard": matrix.shard,
        "shape": list(matrix.shape),
        "rank": matrix.rank,
        "scaling": matrix.scaling,
    }


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
