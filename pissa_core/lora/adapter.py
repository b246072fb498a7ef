"""What an adapter is, from its config and its header alone: pairs, and what goes with them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pissa_core.errors import HeaderInvalid, NoSafetensors, UnsupportedAdapter, UnsupportedDtype
from pissa_core.layout.header import TensorInfo, read_header
from pissa_core.layout.jsonfile import LARGEST_CONFIG, read_object
from pissa_core.lora.patterns import value_for
from pissa_core.ports import CheckpointSource

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
DTYPES = ("F32", "F16", "BF16")

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"^(.+)\.(lora_A|lora_B)\.weight$|^(.+)\.(lora_embedding_A|lora_embedding_B)$")
_MAGNITUDE = ".lora_magnitude_vector"

# Fields under which [B, −B₀]·[A; A₀] is not what PEFT would compute.
_UNSUPPORTED = {
    "lora_bias": "B has a bias of its own",
    "target_parameters": "LoRA on parameters stacks its factors in another way",
    "alora_invocation_tokens": "activated LoRA leaves the base as it is before the invocation",
    "use_qalora": "QALoRA pools the inputs",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "KaSA changes the base and its factors",
    "monteclora_config": "MonteCLoRA draws its factors at random",
    "velora_config": "VeLoRA changes the inputs",
    "arrow_config": "Arrow routes between adapters",
}


@dataclass(frozen=True, slots=True)
class Pair:
    """The factors of one module: ΔW = scaling · B @ A, A (r, n), B (m, r).

    An embedding's are transposed lookups, A (r, vocabulary) and B (dimensions, r); what is done
    to them is the same.
    """

    module: str
    a: TensorInfo
    b: TensorInfo
    scaling: float

    @property
    def rank(self) -> int:
        """r, which the tensors tell."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): of the matrix that is adapted."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.a.nbytes + self.b.nbytes


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter to be read: its config, its pairs by module, its other tensors.

    Attributes:
        carried: tensors that replace or scale the base's own: modules saved whole, biases,
            trained tokens, DoRA's magnitudes. They mean the same on the original base.
        left_out: copies of a target's own weight, which PEFT saves with targets it takes for
            embeddings; on a residual base that is the residual.
    """

    ref: str
    commit: str | None
    config: Mapping[str, Any]
    pairs: Mapping[str, Pair]
    carried: tuple[TensorInfo, ...]
    left_out: tuple[str, ...]

    @property
    def base(self) -> str | None:
        """What the config names as the base model."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None


def read_adapter(source: CheckpointSource) -> Adapter:
    """Read an adapter's config and header, and refuse what cannot be converted correctly.

    Raises:
        UnsupportedAdapter: naming the field or the tensor, and why.
        NoSafetensors, HeaderInvalid, ShardTruncated: if the files are not what they should be.
    """
    config = read_config(source)
    _refuse_unsupported(source.ref, config)
    size = source.files()[WEIGHTS].size
    tensors = read_header(source, WEIGHTS, size).tensors
    factors: dict[str, dict[str, TensorInfo]] = {}
    others = []
    for tensor in tensors:
        if match := _FACTOR.match(tensor.name):
            module = (match[1] or match[3]).removeprefix(_PREFIX)
            factors.setdefault(module, {})[(match[2] or match[4])[-1]] = tensor
        else:
            others.append(tensor)
    pairs = {module: _pair(module, found, config) for module, found in sorted(factors.items())}
    if not pairs:
        raise UnsupportedAdapter(f"{source.ref} holds no LoRA factors at all")
    own = {f"{_PREFIX}{module}.base_layer.weight" for module in pairs}
    return Adapter(
        ref=source.ref,
        commit=source.commit,
        config=config,
        pairs=pairs,
        carried=tuple(_carried(others, own)),
        left_out=tuple(tensor.name for tensor in others if tensor.name in own),
    )


def read_config(source: CheckpointSource) -> dict[str, Any]:
    """Read adapter_config.json.

    Raises:
        UnsupportedAdapter: if there is none.
        NoSafetensors: if the factors are not in safetensors.
        HeaderInvalid: if it is no JSON object.
    """
    files = source.files()
    if CONFIG not in files:
        inside = sorted(path for path in files if path.endswith(f"/{CONFIG}"))
        near = inside[0].removesuffix(f"/{CONFIG}") if inside else None
        raise UnsupportedAdapter(
            f"{source.ref} holds no {CONFIG}, so it is not an adapter",
            hint=f"there is one in its folder {near}" if near else "name the adapter's own folder",
        )
    if WEIGHTS not in files:
        raise NoSafetensors(
            f"{source.ref} holds no {WEIGHTS}",
            hint="save the adapter with safe_serialization, PEFT's default",
        )
    return read_object(source, CONFIG, LARGEST_CONFIG)


def _refuse_unsupported(ref: str, config: Mapping[str, Any]) -> None:
    kind = str(config.get("peft_type"))
    if kind != "LORA":
        raise UnsupportedAdapter(f"{ref} is of the type {kind}; only LORA can be converted")
    for field, reason in _UNSUPPORTED.items():
        if config.get(field):
            raise UnsupportedAdapter(
                f"{ref} was trained with {field}={config[field]!r}, which cannot be converted: "
                f"{reason}"
            )


def _pair(module: str, found: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Pair:
    if set(found) != {"A", "B"}:
        (only,) = found.values()
        raise UnsupportedAdapter(f"{only.name} has no other half: A and B come in pairs")
    a, b = found["A"], found["B"]
    for tensor in (a, b):
        if tensor.dtype not in DTYPES:
            raise UnsupportedDtype(
                f"{tensor.name} is {tensor.dtype}; factors must be one of {', '.join(DTYPES)}"
            )
        if len(tensor.shape) != 2:
            raise UnsupportedAdapter(
                f"{tensor.name} has the shape {list(tensor.shape)}; only matrices can be converted"
            )
    rank = a.shape[0]
    said = number(config, "rank_pattern", "r", module)
    if b.shape[1] != rank or said != rank:
        raise UnsupportedAdapter(
            f"{module}: A has rank {rank}, B has rank {b.shape[1]}, and {CONFIG} says {said:g}",
            hint="the adapter does not belong to its config; save it again",
        )
    alpha = number(config, "alpha_pattern", "lora_alpha", module)
    return Pair(module, a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def number(config: Mapping[str, Any], patterns: str, default: str, module: str) -> float:
    """Return what a config says of one module: of its patterns, else its default.

    Raises:
        HeaderInvalid: if that is no positive number, or a pattern is none.
    """
    given = config.get(patterns) or {}
    try:
        known = isinstance(given, dict)
        value = value_for(module, given, config.get(default, 8)) if known else None
    except re.error as error:
        raise HeaderInvalid(
            f"{CONFIG}: {patterns} has a key that is no regular expression: {error}"
        ) from error
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise HeaderInvalid(f"{CONFIG}: {default} of {module} is {value!r}, not a positive number")
    return value


def _carried(others: Iterable[TensorInfo], own: set[str]) -> Iterable[TensorInfo]:
    for tensor in others:
        if ".lora_" in tensor.name and not tensor.name.endswith(_MAGNITUDE):
            raise UnsupportedAdapter(
                f"{tensor.name} is a part of LoRA that this version does not know"
            )
        if tensor.name not in own:
            yield tensor
