"""layout + targets + config → Plan: what will happen to every tensor, decided before it does.

A plan is data: frozen, printable, serialisable. A shard worker needs the plan, a source and a
sink, and nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SCHEMA = 1

IN_FLIGHT = 3
"""Shards under way together: one downloads, one computes, one uploads."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One target: where its tensor lies, and what becomes of it.

    Attributes:
        module: path in the model as PEFT names it, ``model.layers.0.self_attn.q_proj``.
        tensor: key in the checkpoint, which may differ from ``module + ".weight"``.
        shape: as stored; (out, in) for Linear, (in, out) for a Conv1D (`transposed`).
        shard: the file of the output that its residual goes to.
        start: first byte of the tensor's data, counted from the start of that file.
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
class Piece:
    """A tensor in the file of an adapter: what it is, and where its data lies."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Fold:
    """What a plan of kind ``pissa-to-base`` adds: an adapter that goes into the weights.

    Attributes:
        adapter: reference of the adapter; on the Hub with its commit.
        pieces: where each of its tensors lies, by PEFT's key, in its one file.
        replaced: tensors that it stores whole and that take the place of the checkpoint's.
        initial: it is the adapter that the residual was made with, so the result is the original.
        original: the model before the conversion, if the result can be held against it.
        places: where in the original each target's tensor lies, as shard and first byte.
        listed: path → sha256 of the residual's files of weights, as its manifest says.
    """

    adapter: str
    adapter_commit: str | None
    adapter_sha256: str
    pieces: Mapping[str, Piece]
    replaced: tuple[CarriedTensor, ...]
    initial: bool
    original: str | None
    original_commit: str | None
    places: Mapping[str, tuple[str, int]]
    listed: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something that was asked for and cannot be converted correctly, and why."""

    name: str
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tensors of a source shard that is too large for the disk to be worked on whole.

    Attributes:
        start: first byte of the run in the source shard; `stop` is the one behind its last.
        header: JSON header of the output shard, behind which the run's bytes lie as they are.
    """

    start: int
    stop: int
    header: str

    @property
    def shift(self) -> int:
        """What a position in the output shard lacks to be the one in the source shard."""
        return self.start - 8 - len(self.header.encode())  # 8 bytes give the header's length


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One file of weights in the output: its size and its targets, in the order of their offsets.

    Attributes:
        path: in the output, as everywhere in a plan, in seals and in events.
        origin: path of the source shard it is made from; empty if it is the same.
        run: what of the source shard it holds; None if it is all of it, byte for byte.
    """

    path: str
    size: int
    matrices: tuple[Matrix, ...]
    origin: str = ""
    run: Run | None = None

    @property
    def source_path(self) -> str:
        """The source shard it is made from."""
        return self.origin or self.path

    @property
    def fetched(self) -> int:
        """Bytes that it takes of the source shard."""
        return self.size if self.run is None else self.run.stop - self.run.start

    def source_start(self, start: int) -> int:
        """Return where in the source shard the byte `start` of this one lies."""
        return start if self.run is None else start + self.run.shift


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the work will cost, in bytes; the formulas stand in docs/ARCHITECTURE.md."""

    read: int
    written: int
    adapter: int
    peak_memory: int
    peak_disk: int
    peak_device_memory: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything decided: nothing below looks at headers, PEFT or the model's class again.

    Attributes:
        index: path of the index of weights in the output; None for a single file.
        new_index: what the index says where shards were divided; None: as in the source.
        card_without: metadata of the source's card that the place of the result refuses.
        notes: what the user should know and nothing refuses, in sentences.
    """

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
    new_index: str | None = None
    card_without: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    fold: Fold | None = None

    @property
    def division(self) -> str | None:
        """A digest of how shards were divided; None if every one stayed whole."""
        if self.new_index is None:
            return None
        runs = [(shard.path, shard.source_path, shard.run) for shard in self.shards]
        return hashlib.sha256(repr(runs).encode()).hexdigest()[:16]

    @property
    def kind(self) -> str:
        """What is done: ``base-to-pissa``, or ``pissa-to-base`` where an adapter is folded in."""
        return "base-to-pissa" if self.fold is None else "pissa-to-base"

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Every target, shard by shard in the order of offsets."""
        return tuple(matrix for shard in self.shards for matrix in shard.matrices)

    @property
    def copied(self) -> tuple[str, ...]:
        """Files besides the shards that the output has from the source, byte for byte."""
        index = () if self.index is None or self.new_index is not None else (self.index,)
        return (*index, *self.side_files)

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
            "matrices": [row_of(matrix) for matrix in self.matrices],
            "refused": [dataclasses.asdict(refusal) for refusal in self.refused],
            "left_out": list(self.left_out),
            "bytes": {
                "read": self.estimate.read,
                "written": self.estimate.written,
                "adapter": self.estimate.adapter,
            },
            "peak_memory_bytes": self.estimate.peak_memory,
            "peak_disk_bytes": self.estimate.peak_disk,
            "peak_device_memory_bytes": self.estimate.peak_device_memory,
            "trainable_parameters": self.trainable_parameters,
            "divided": _divided(self.shards),
            "notes": list(self.notes),
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
                origin=shard.get("origin", ""),
                run=Run(**shard["run"]) if shard.get("run") else None,
            )
            for shard in data["shards"]
        )
        data["carried"] = tuple(
            CarriedTensor(**{**t, "shape": tuple(t["shape"])}) for t in data["carried"]
        )
        data["refused"] = tuple(Refusal(**r) for r in data["refused"])
        data["estimate"] = Estimate(**data["estimate"])
        data["fold"] = _read_fold(data["fold"]) if data.get("fold") else None
        for field in ("side_files", "left_out", "card_without", "notes"):
            data[field] = tuple(data.get(field, ()))
        return cls(**data)


def _divided(shards: tuple[ShardPlan, ...]) -> list[dict[str, Any]]:
    """List the source shards that become several, with the files they become."""
    parts: dict[str, list[str]] = {}
    for shard in shards:
        if shard.run is not None:
            parts.setdefault(shard.source_path, []).append(shard.path)
    return [{"shard": source, "into": paths} for source, paths in parts.items()]


def _read_fold(data: Mapping[str, Any]) -> Fold:
    pieces = {
        key: Piece(**{**piece, "shape": tuple(piece["shape"])})
        for key, piece in data["pieces"].items()
    }
    replaced = tuple(CarriedTensor(**{**t, "shape": tuple(t["shape"])}) for t in data["replaced"])
    places = {name: (shard, start) for name, (shard, start) in data["places"].items()}
    return Fold(**{**data, "pieces": pieces, "replaced": replaced, "places": places})


def name_of(matrix: Matrix) -> str:
    """Return how a sentence calls a matrix: its tensor and that one's shape."""
    return f"{matrix.tensor} {list(matrix.shape)}"


def row_of(matrix: Matrix) -> dict[str, Any]:
    """Return what a plan says of a matrix, as plans show it and rows of a manifest begin."""
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
