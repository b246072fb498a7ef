"""What was asked: the PiSSA config, the one definition for REST, CLI and manifest.

The fields and their meaning are PEFT's wherever PEFT has them, so a config can be copied from
a `LoraConfig` and back. Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pissa_core.errors import InvalidConfig
from pissa_core.wording import wrongs

DEFAULT_RANK = 16
DEFAULT_TOLERANCE = 1e-4
DEFAULT_NITER = 16

SvdMethod = Literal["auto", "exact", "lowrank"]
Rounding = Literal["faithful", "peft"]
AdapterDtype = Literal["float32", "bfloat16", "float16"]
TaskType = Literal[
    "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"
]


def _no_bool(value: object) -> object:
    # Pydantic would read True as 1; a rank of True is a mistake in the request.
    if isinstance(value, bool):
        raise ValueError("a number is needed, not a boolean")
    return value


# Beyond these a size leaves torch's integers, and a scaling the range of float32.
_LARGEST_RANK = 2**31 - 1
_LARGEST_ALPHA = 10**30

Rank = Annotated[int, Field(ge=1, le=_LARGEST_RANK), BeforeValidator(_no_bool)]
Alpha = Annotated[
    Annotated[int, Field(gt=0, le=_LARGEST_ALPHA)]
    | Annotated[float, Field(gt=0, le=_LARGEST_ALPHA, allow_inf_nan=False)],
    BeforeValidator(_no_bool),
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SvdConfig(_Frozen):
    """How the principal singular triplets are found."""

    method: SvdMethod = Field(
        "auto",
        description="auto: the cheapest route that reaches the tolerance; exact: a full SVD; "
        "lowrank: PEFT's randomised SVD with niter power iterations",
    )
    tolerance: float = Field(
        DEFAULT_TOLERANCE,
        gt=0,
        lt=1,
        description="auto only: the share of the optimal captured energy (the sum of the top r "
        "squared singular values) that may be missing",
    )
    niter: Annotated[int, BeforeValidator(_no_bool)] = Field(
        DEFAULT_NITER, ge=0, le=1000, description="lowrank only: power iterations"
    )
    seed: Annotated[int, BeforeValidator(_no_bool)] = Field(
        0, ge=0, lt=2**63, description="seed of the random start; each matrix derives its own"
    )


class PissaConfig(_Frozen):
    """What to decompose and how; unknown fields are refused."""

    rank: Rank = Field(DEFAULT_RANK, description="r, the number of singular triplets a matrix")
    lora_alpha: Alpha | None = Field(None, description="scaling = lora_alpha / r; default: rank")
    use_rslora: bool = Field(False, description="scaling = lora_alpha / sqrt(r)")
    target_modules: str | list[str] = Field(
        "all-linear",
        description='"all-linear", a regular expression that matches the whole module path, or a '
        "list of path endings; PEFT's semantics",
    )
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    alpha_pattern: dict[str, Alpha] = Field(default_factory=dict)
    svd: SvdConfig = Field(default_factory=SvdConfig)
    init_lora_weights: str | None = Field(
        None,
        description='PEFT\'s spelling of the method: "pissa" (exact) or "pissa_niter_N" '
        "(lowrank with niter N); shown as svd.method once accepted",
    )
    rounding: Rounding = Field(
        "faithful",
        description="faithful: the residual is formed from the factors as stored; peft: formed "
        "as PEFT forms it, bit for bit with exact",
    )
    adapter_dtype: AdapterDtype = "float32"
    task_type: TaskType | None = None

    @model_validator(mode="before")
    @classmethod
    def _spell_method(cls, data: Any) -> Any:
        """Turn PEFT's `init_lora_weights` into `svd.method` and `svd.niter`."""
        if not isinstance(data, Mapping) or data.get("init_lora_weights") is None:
            return data
        spelled = data["init_lora_weights"]
        implied = _method_of(spelled)
        svd = data.get("svd") or {}
        given = svd.model_dump(exclude_unset=True) if isinstance(svd, SvdConfig) else svd
        clash = [name for name in implied if isinstance(given, Mapping) and name in given]
        if clash:
            raise ValueError(
                f"init_lora_weights={spelled!r} already says svd.{clash[0]}; give one of the two"
            )
        return {**data, "svd": {**given, **implied}, "init_lora_weights": None}

    @model_validator(mode="before")
    @classmethod
    def _fill_alpha(cls, data: Any) -> Any:
        """Take the rank for `lora_alpha` where none is given, so that what is shown says so."""
        if not isinstance(data, Mapping) or data.get("lora_alpha") is not None:
            return data
        rank = data.get("rank", DEFAULT_RANK)
        # A rank that is none is said of the rank alone.
        usable = isinstance(rank, int) and rank >= 1
        return {**data, "lora_alpha": rank} if usable else data

    @model_validator(mode="after")
    def _check_together(self) -> PissaConfig:
        if isinstance(self.target_modules, list) and not self.target_modules:
            raise ValueError("target_modules is an empty list; name at least one module")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            _check_regex("target_modules", self.target_modules)
        if isinstance(self.exclude_modules, str):
            _check_regex("exclude_modules", self.exclude_modules)
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, field):
                _check_regex(field, pattern)
        self._check_layers()
        if self.rounding == "peft" and self.adapter_dtype != "float32":
            raise ValueError(
                f"rounding='peft' needs adapter_dtype='float32', not {self.adapter_dtype!r}: "
                "PEFT saves its factors in float32"
            )
        return self

    def _check_layers(self) -> None:
        # PEFT raises for these when the LoraConfig is made; said here, before any model.
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern says nothing without layers_to_transform")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform needs target_modules as a list, as in PEFT; "
                f"target_modules is the string {self.target_modules!r}"
            )
        indices = self.layers_to_transform
        for index in [indices] if isinstance(indices, int) else indices or []:
            if index < 0:
                raise ValueError(f"layers_to_transform holds {index}; layers count from 0")

    @property
    def alpha(self) -> int | float:
        """`lora_alpha`, which is the rank where none was given (scaling 1)."""
        return self.rank if self.lora_alpha is None else self.lora_alpha

    def scaling(self, rank: int, alpha: int | float) -> float:
        """Return the factor before B @ A: alpha / r, with rslora alpha / sqrt(r)."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


class LoraOptions(_Frozen):
    """How a trained adapter becomes a plain LoRA; with nothing given it is exact, of rank 2r."""

    rank: Rank | None = Field(None, description="the largest rank a module may have")
    tolerance: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="the share of each module's update (its squared singular values) that may be "
        "lost; the rank of each module is the smallest that keeps to it",
    )
    uniform: bool = Field(
        False,
        description="the same rank and scaling for every module, padded with zeros, for servers "
        "that read only r and lora_alpha",
    )

    def compresses(self, widest: int) -> bool:
        """Whether something is left out of updates whose ranks are at most `widest`."""
        smaller = self.rank is not None and self.rank < widest
        return smaller or self.tolerance is not None


def parse_config(data: Mapping[str, Any]) -> PissaConfig:
    """Read a config from JSON or YAML data.

    Raises:
        InvalidConfig: naming the first field that is wrong, its value and what is accepted.
    """
    try:
        return PissaConfig.model_validate(dict(data))
    except ValidationError as error:
        raise InvalidConfig(_sentence(error, data)) from error


def _sentence(error: ValidationError, data: object) -> str:
    """Say in one sentence which field a pydantic error is about, its value, and why."""
    first = wrongs(error.errors(include_url=False), data)[0]
    where = ".".join(str(part) for part in first.place)
    return f"{where}: {first.why}" if where else first.why


def _method_of(spelled: object) -> dict[str, object]:
    if spelled == "pissa":
        return {"method": "exact"}
    match = re.fullmatch(r"pissa_niter_(\d{1,4})", spelled) if isinstance(spelled, str) else None
    if match is None:
        raise ValueError(
            f"init_lora_weights is {spelled!r}; accepted are 'pissa' and 'pissa_niter_N'"
        )
    return {"method": "lowrank", "niter": int(match[1])}


def _check_regex(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{field} holds {pattern!r}, not a regular expression: {error}") from error
