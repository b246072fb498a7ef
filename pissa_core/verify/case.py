"""What is to be verified, as data: what headers and configs told, and what is still to be read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pissa_core.plan import CarriedTensor, Matrix, Piece

CHECKS = {
    "manifest": "the manifest is whole and says what the rest says",
    "files": "every file is there, with the checksum in the manifest",
    "side files": "config, tokenizer and the like are the original's",
    "adapter": "keys, shapes and config are as PEFT wants them, and loading decomposes nothing",
    "tensors": "untouched tensors are the original's to the bit",
    "targets": "residual + scaling · B · A is the original within what rounding allows",
    "figures": "energies and errors in the manifest are what is measured",
}
"""Every check and what it asks, in the order of the report."""

OTHERS = "files beside the weights"
"""The unit of work that is no shard."""


def of_a_tool(path: str) -> bool:
    """Whether a file is what Git or a download leaves in a folder; it is no part of a model."""
    first, _, rest = path.partition("/")
    return path in {".gitattributes", ".gitignore"} or (bool(rest) and first in {".cache", ".git"})


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is not as it should be.

    Attributes:
        check: the one of `CHECKS` that found it.
        where: a file, a module or a tensor.
    """

    check: str
    where: str
    what: str


@dataclass(frozen=True, slots=True)
class Unit:
    """What one step looks at: a shard of the converted model, its adapter, or the other files."""

    path: str
    size: int


@dataclass(frozen=True, slots=True)
class Case:
    """Everything a step needs besides the two checkpoints themselves.

    Attributes:
        matrices: the targets, where their residuals lie in the converted model.
        pieces: where the factors lie in the adapter's file, by key.
        carried: tensors that the adapter stores whole, where they lie in the original.
        side_files: files that must be the original's.
        manifest: of the converted model, as far as it can be used.
        unchecked: what could not be looked at because of a fault, in a sentence.
    """

    source: str
    commit: str | None
    converted: str
    converted_commit: str | None
    units: tuple[Unit, ...]
    matrices: tuple[Matrix, ...]
    pieces: Mapping[str, Piece]
    carried: tuple[CarriedTensor, ...]
    side_files: tuple[str, ...]
    manifest: Mapping[str, Any]
    faults: tuple[Fault, ...]
    unchecked: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def shards(self) -> tuple[Unit, ...]:
        """The units, under the name that the store counts them by."""
        return self.units

    @property
    def config(self) -> Mapping[str, Any]:
        """The config of the conversion, as the manifest tells it."""
        config = self.manifest.get("config")
        return config if isinstance(config, dict) else {}

    def to_json(self) -> str:
        """Serialise; `from_json` gives an equal case."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Case:
        """Read what `to_json` wrote."""
        data = json.loads(text)
        data["units"] = tuple(Unit(**unit) for unit in data["units"])
        data["matrices"] = tuple(
            Matrix(**{**m, "shape": tuple(m["shape"])}) for m in data["matrices"]
        )
        data["pieces"] = {
            key: Piece(**{**piece, "shape": tuple(piece["shape"])})
            for key, piece in data["pieces"].items()
        }
        data["carried"] = tuple(
            CarriedTensor(**{**t, "shape": tuple(t["shape"])}) for t in data["carried"]
        )
        data["faults"] = tuple(Fault(**fault) for fault in data["faults"])
        for field in ("side_files", "unchecked", "notes"):
            data[field] = tuple(data[field])
        return cls(**data)
