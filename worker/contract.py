"""What API, store and workers agree on: the payloads; their words are those of `terms`.

Importing this module loads no torch and no Celery. Messages carry ids only; everything else
about a job lies in the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from pissa_core.refs import parse_output, parse_ref
from pissa_core.spec import LoraOptions, PissaConfig
from worker.settings import parse_size
from worker.terms import KINDS, EventType, Phase, Status


def _a_reference(value: object) -> object:
    if isinstance(value, str):
        parse_ref(value)
    return value


Reference = Annotated[
    str,
    BeforeValidator(_a_reference),
    Field(max_length=4096, examples=["org/name@main"], description="a Hub reference or local path"),
]


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Output(_Closed):
    """Where the result goes and how it is published; a bare reference is short for `ref`.

    `private`, `branch`, `overwrite` and `commit_message` are for an output on the Hub.
    """

    ref: Reference
    private: bool = Field(False, description="make the repo a private one")
    branch: str | None = Field(
        None, min_length=1, max_length=255, description="made if it is not there; default: main"
    )
    overwrite: bool = Field(False, description="replace what the branch holds")
    commit_message: str | None = Field(None, min_length=1, max_length=2000)
    max_shard_size: Annotated[int, Field(gt=0), BeforeValidator(parse_size)] = Field(
        5_000_000_000, description="of the files that a shard too large for the disk becomes"
    )

    @model_validator(mode="after")
    def _can_be_written(self) -> Output:
        parse_output(self.ref, self.branch)
        return self


def _output(value: object) -> object:
    return {"ref": value} if isinstance(value, str) else value


class WithOutput(_Closed):
    """A request whose result goes somewhere; without `output` the service keeps the files."""

    output: Annotated[
        Output | None, BeforeValidator(_output, json_schema_input_type=Reference | Output | None)
    ] = None


class BaseToPissa(WithOutput):
    """A `base-to-pissa` job: base model and config in, residual model and initial adapter out."""

    kind: Literal["base-to-pissa"] = "base-to-pissa"
    model: Reference
    pissa: PissaConfig = Field(default_factory=PissaConfig)


class PissaToLora(WithOutput):
    """A `pissa-to-lora` job: trained and initial adapter in, LoRA for the original base out."""

    kind: Literal["pissa-to-lora"]
    initial: Reference | None = Field(
        None, description="left out: found through the trained adapter's base model"
    )
    trained: Reference
    lora: LoraOptions = Field(default_factory=LoraOptions)


class PissaToBase(WithOutput):
    """A `pissa-to-base` job: residual model and an adapter in, plain model out."""

    kind: Literal["pissa-to-base"]
    residual: Reference
    adapter: Reference


class Verify(_Closed):
    """A `verify` job: original and converted model in, figures and a verdict out; no files."""

    kind: Literal["verify"]
    original: Reference
    converted: Reference


def _kind_of(value: object) -> str | None:
    kind = value.get("kind", KINDS[0]) if isinstance(value, Mapping) else getattr(value, "kind", "")
    return kind if isinstance(kind, str) else None


JobRequest = Annotated[
    Annotated[BaseToPissa, Tag("base-to-pissa")]
    | Annotated[PissaToLora, Tag("pissa-to-lora")]
    | Annotated[PissaToBase, Tag("pissa-to-base")]
    | Annotated[Verify, Tag("verify")],
    Discriminator(
        _kind_of,
        custom_error_type="unknown_kind",
        custom_error_message=f"there is no such kind of job; there are {', '.join(KINDS)}",
    ),
]


class Count(BaseModel):
    """How much of something is done."""

    done: int = 0
    total: int = 0


class Progress(BaseModel):
    """How far a job is; totals are 0 until it is planned."""

    matrices: Count = Field(default_factory=Count)
    shards: Count = Field(default_factory=Count)
    bytes: Count = Field(default_factory=Count)


class JobError(BaseModel):
    """Why a job failed: a stable code, a sentence, what to try."""

    code: str
    message: str
    hint: str | None = None


class JobWait(BaseModel):
    """Why a job waits: a code, a sentence where there is one, how long until it tries again."""

    code: str
    message: str | None = None
    delay_s: float = 0


class Job(BaseModel):
    """A job as every answer shows it; no secret is in it."""

    id: str
    kind: str
    status: Status
    phase: Phase
    waiting: JobWait | None = Field(None, description="why, in the phase `waiting`")
    staged: bool = Field(False, description="work of it is kept that a resume goes on from")
    progress: Progress
    eta_s: float | None = None
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    attempts: int = 0
    request: dict[str, Any]
    result: dict[str, Any] | None = None
    error: JobError | None = None


class JobEvent(BaseModel):
    """One entry of a job's event stream; `id` orders them."""

    id: str
    at: datetime
    type: EventType
    data: dict[str, Any] = Field(default_factory=dict)
