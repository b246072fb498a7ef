"""The worker's part in a job, played step by step on the real store, without torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pissa_core.errors import PissaError
from pissa_core.plan import Estimate, Matrix, Plan, ShardPlan
from pissa_core.ports import FileInfo
from pissa_core.report.manifest import manifest
from worker.connect import connect
from worker.processes import holder_id
from worker.settings import Settings
from worker.store import Claim, TaskStore

SHARD = "model.safetensors"
MATRICES = tuple(
    Matrix(
        module=f"layers.{n}.q_proj",
        tensor=f"layers.{n}.q_proj.weight",
        shard=SHARD,
        dtype="F32",
        shape=(4, 4),
        start=100 + 64 * n,
        stop=164 + 64 * n,
        rank=2,
        scaling=1.0,
        transposed=False,
        key_a=f"base_model.model.layers.{n}.q_proj.lora_A.weight",
        key_b=f"base_model.model.layers.{n}.q_proj.lora_B.weight",
    )
    for n in range(3)
)
PLAN = Plan(
    source="hf://org/name@" + "0" * 40,
    commit="0" * 40,
    model_class="LlamaForCausalLM",
    names_from="transformers",
    config={"rank": 2},
    adapter_config={},
    shards=(ShardPlan(path=SHARD, size=292, matrices=MATRICES),),
    carried=(),
    index=None,
    side_files=("config.json",),
    left_out=(),
    refused=(),
    estimate=Estimate(read=292, written=484, adapter=192, peak_memory=1000, peak_disk=676),
)


def row_of(matrix: Matrix) -> dict[str, Any]:
    """Return a matrix's row in the manifest."""
    return {
        "module": matrix.module,
        "tensor": matrix.tensor,
        "shard": matrix.shard,
        "shape": list(matrix.shape),
        "rank": matrix.rank,
        "scaling": matrix.scaling,
        "sigma": [2.0, 1.0],
        "energy": 0.75,
        "missed": 1e-6,
        "recombination_error": 1e-4,
        "method": "exact",
    }


class PlayedWorker:
    """Takes a job through its tasks; each step is what a worker writes there."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tasks = TaskStore(connect(settings), settings, worker="played")

    def close(self) -> None:
        self.tasks.connection.close()

    def claim(self, job_id: str, task: str) -> Claim:
        claim = self.tasks.claim(job_id, task, holder=holder_id())
        assert claim is not None, f"{task} of {job_id} was not to be had"
        return claim

    def prepare(self, job_id: str) -> None:
        self.tasks.planned(self.claim(job_id, "prepare"), PLAN, "digest-of-" + job_id)

    def start_shard(self, job_id: str) -> Claim:
        claim = self.claim(job_id, "shard:0")
        self.tasks.shard_started(claim, SHARD, len(MATRICES), 0)
        return claim

    def finish_matrix(self, claim: Claim, number: int) -> None:
        row = row_of(MATRICES[number])
        self.tasks.matrix_done(claim, row, nbytes=64, seconds=0.01, resumed=False)

    def finish_shard(self, claim: Claim) -> None:
        self.tasks.shard_done(
            claim, SHARD, nbytes=292, matrices=len(MATRICES), resumed=False, peak=1000
        )

    def publish(self, job_id: str, folder: Path, files: dict[str, bytes], **figures: Any) -> None:
        """Write `files` and their manifest below `folder`, and end the job."""
        claim = self.claim(job_id, "publish")
        folder.mkdir(parents=True)
        infos = {}
        for path, content in files.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(content)
            infos[path] = FileInfo(len(content), hashlib.sha256(content).hexdigest())
        text = manifest(PLAN, [row_of(matrix) for matrix in MATRICES], infos)
        (folder / "pissa_manifest.json").write_bytes(text)
        result = {"output": str(folder), "matrices": len(MATRICES), "energy": 0.75, **figures}
        self.tasks.published(claim, result=result, manifest=json.loads(text), peak=1000)
        self.tasks.finish(claim)

    def fail(self, job_id: str, error: PissaError) -> None:
        self.tasks.fail(self.claim(job_id, "prepare"), error, discard=False)

    def complete(self, job_id: str, folder: Path, files: dict[str, bytes], **figures: Any) -> None:
        """Take a queued job to its end; `figures` are added to its result."""
        self._work(job_id)
        self.publish(job_id, folder, files, **figures)

    def verify(self, job_id: str, *, passed: bool, **found: Any) -> None:
        """Take a queued verification to its end; `found` is more of its report."""
        self._work(job_id)
        claim = self.claim(job_id, "publish")
        rows = [row_of(matrix) for matrix in MATRICES]
        report = {"schema": 1, "kind": "verify", "matrices": rows, "passed": passed}
        report |= {"files": {"pissa_manifest.json": {}}, "checks": [], "unchecked": [], **found}
        figures = {
            "matrices": len(rows),
            "max_recombination_error": 1e-4,
            "faults": int(not passed),
        }
        result = {"output": None, "manifest": f"/v1/jobs/{job_id}/manifest", **figures}
        result["passed"] = passed
        self.tasks.published(claim, result=result, manifest=report, peak=1000)
        self.tasks.finish(claim)

    def _work(self, job_id: str) -> None:
        self.prepare(job_id)
        claim = self.start_shard(job_id)
        for number in range(len(MATRICES)):
            self.finish_matrix(claim, number)
        self.finish_shard(claim)
