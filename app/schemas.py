"""The shapes of the API's answers, and the examples its documentation shows."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from worker.contract import Job, JobEvent


class CancelBody(BaseModel):
    """How to cancel."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    discard: bool = Field(False, description="throw away what is sealed, too")


class JobList(BaseModel):
    """A page of jobs, newest first."""

    jobs: list[Job]
    next: str | None = Field(description="cursor of the next page, for `after`")


class EventList(BaseModel):
    """A page of a job's events, oldest first."""

    events: list[JobEvent]
    next: str | None = Field(description="cursor of the next page, for `after`")


class FileEntry(BaseModel):
    """One file of a result."""

    path: str
    size: int
    sha256: str


class FileList(BaseModel):
    """The files of a result."""

    files: list[FileEntry]


class WorkerEntry(BaseModel):
    """A worker that has been heard of lately."""

    name: str
    device: str
    busy: bool
    seen_s: float = Field(description="seconds since its last heartbeat")


class Readiness(BaseModel):
    """Whether jobs can be taken, and who would do them."""

    store: str
    workers: list[WorkerEntry]


class Liveness(BaseModel):
    """The process answers."""

    status: str = "ok"


class PlanMatrix(BaseModel):
    """One target of a plan."""

    module: str
    tensor: str
    shard: str
    shape: list[int]
    rank: int
    scaling: float


class PlanRefusal(BaseModel):
    """Something that cannot be converted correctly, and why."""

    name: str
    code: str
    reason: str


class PlanBytes(BaseModel):
    """What is read and written, in bytes."""

    read: int
    written: int
    adapter: int


class PlanDivision(BaseModel):
    """A source shard that the disk budget cannot hold, and the files it becomes."""

    shard: str
    into: list[str]


class PlanAnswer(BaseModel):
    """What a job would do; nothing was read but headers."""

    model_config = ConfigDict(extra="allow")

    source: str
    commit: str | None
    model_class: str | None
    names_from: str
    matrices: list[PlanMatrix]
    refused: list[PlanRefusal]
    left_out: list[str]
    notes: list[str] = Field(description="what to know that refuses nothing")
    divided: list[PlanDivision]
    bytes: PlanBytes
    peak_memory_bytes: int
    peak_disk_bytes: int
    peak_device_memory_bytes: int
    trainable_parameters: int


class ManifestFile(BaseModel):
    """Checksum and size of a published file."""

    sha256: str
    size: int


class ManifestSource(BaseModel):
    """What was converted."""

    ref: str
    commit: str | None


class ManifestAnswer(BaseModel):
    """The manifest: complete once the job has succeeded, its rows so far while it runs."""

    model_config = ConfigDict(extra="allow")

    schema_: int = Field(alias="schema")
    kind: str
    source: ManifestSource
    config: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, ManifestFile]
    matrices: list[dict[str, Any]] = Field(description="one row a matrix")
    totals: dict[str, Any]


class FieldProblem(BaseModel):
    """One place of the request that is wrong."""

    loc: list[str | int]
    msg: str


class Problem(BaseModel):
    """An error, as RFC 9457 spells it, with a stable code and a hint."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str
    hint: str | None
    errors: list[FieldProblem]


JOB_ID = "job_0193f2a8c4e17d5b"

JOB_REQUEST_EXAMPLES: dict[str, Any] = {
    "hub": {
        "summary": "From the Hub to the Hub",
        "value": {
            "kind": "base-to-pissa",
            "model": "org/name@main",
            "output": "hf://me/name-pissa-r16",
            "pissa": {"rank": 16, "target_modules": "all-linear"},
        },
    },
    "kept": {
        "summary": "Two projections of each layer; the service keeps the files",
        "value": {
            "kind": "base-to-pissa",
            "model": "org/name",
            "pissa": {"rank": 64, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"]},
        },
    },
    "exact": {
        "summary": "As PEFT does it, bit for bit",
        "value": {
            "kind": "base-to-pissa",
            "model": "org/name",
            "output": {"ref": "hf://me/name", "private": True, "branch": "pissa-r128"},
            "pissa": {"rank": 128, "init_lora_weights": "pissa", "rounding": "peft"},
        },
    },
    "to-lora": {
        "summary": "A trained adapter as plain LoRA for the original model, of rank 16 at most",
        "value": {
            "kind": "pissa-to-lora",
            "initial": "hf://me/name-pissa-r16/pissa_init",
            "trained": "me/name-trained",
            "output": "hf://me/name-lora",
            "lora": {"rank": 16},
        },
    },
    "to-base": {
        "summary": "A residual model and an adapter for it, merged to a plain model",
        "value": {
            "kind": "pissa-to-base",
            "residual": "me/name-pissa-r16",
            "adapter": "me/name-trained",
            "output": "hf://me/name-merged",
        },
    },
    "verify": {
        "summary": "Whether a published pair still is the model it claims to be",
        "value": {
            "kind": "verify",
            "original": "org/name@main",
            "converted": "me/name-pissa-r16",
        },
    },
}
PLAN_REQUEST_EXAMPLES = {"targets": JOB_REQUEST_EXAMPLES["kept"]}

_COUNTS = {
    "matrices": {"done": 12, "total": 154},
    "shards": {"done": 0, "total": 3},
    "bytes": {"done": 1048576, "total": 2200000000},
}
JOB_EXAMPLE: dict[str, Any] = {
    "id": JOB_ID,
    "kind": "base-to-pissa",
    "status": "running",
    "phase": "shards",
    "progress": _COUNTS,
    "eta_s": 41.5,
    "created_at": "2026-01-05T09:00:00Z",
    "started_at": "2026-01-05T09:00:01Z",
    "finished_at": None,
    "attempts": 1,
    "request": {"kind": "base-to-pissa", "model": "org/name@main", "output": None, "pissa": {}},
    "result": None,
    "error": None,
}
EVENT_EXAMPLE: dict[str, Any] = {
    "id": "1767603601000-0",
    "at": "2026-01-05T09:00:01Z",
    "type": "matrix_done",
    "data": {"tensor": "model.layers.0.self_attn.q_proj.weight"},
}
FILE_EXAMPLE: dict[str, Any] = {
    "path": "pissa_init/adapter_model.safetensors",
    "size": 25_231_360,
    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
}
_ROW = {
    "module": "model.layers.0.self_attn.q_proj",
    "tensor": "model.layers.0.self_attn.q_proj.weight",
    "shard": "model-00001-of-00003.safetensors",
    "shape": [4096, 4096],
    "rank": 16,
    "scaling": 1.0,
}
MANIFEST_EXAMPLE: dict[str, Any] = {
    "schema": 1,
    "kind": "base-to-pissa",
    "source": {"ref": "hf://org/name@0123abc", "commit": "0123abc"},
    "config": {"rank": 16},
    "versions": {"pissa-service": "0.1.0"},
    "files": {"config.json": {"sha256": FILE_EXAMPLE["sha256"], "size": 640}},
    "matrices": [{**_ROW, "energy": 0.31, "missed": 2e-5, "recombination_error": 1.1e-3}],
    "totals": {"matrices": 1},
}
PLAN_EXAMPLE: dict[str, Any] = {
    "source": "hf://org/name@0123abc",
    "commit": "0123abc",
    "model_class": "LlamaForCausalLM",
    "names_from": "transformers",
    "matrices": [_ROW],
    "refused": [],
    "left_out": ["original/consolidated.00.pth"],
    "notes": [],
    "divided": [],
    "bytes": {"read": 2200000000, "written": 2225231360, "adapter": 25231360},
    "peak_memory_bytes": 900000000,
    "peak_disk_bytes": 4425231360,
    "peak_device_memory_bytes": 420000000,
    "trainable_parameters": 6307840,
}
READY_EXAMPLE: dict[str, Any] = {
    "store": "ok",
    "workers": [{"name": "gpu0@host", "device": "cuda:0", "busy": True, "seen_s": 1.2}],
}
