"""A worker's side of the store without a worker: plans made by hand, tasks done by telling so."""

from __future__ import annotations

from typing import Any

from pissa_core.plan import Estimate, Matrix, Plan, ShardPlan
from pissa_core.spec import PissaConfig
from worker.contract import BaseToPissa
from worker.processes import holder_id
from worker.store.tasks import Claim, TaskStore

REQUEST = BaseToPissa.model_validate({"model": "org/name", "output": "org/name-pissa"})
DIGEST = "d1"


def make_plan(shards: int = 2, matrices: int = 2) -> Plan:
    return Plan(
        source="hf://org/name@c0ffee",
        commit="c0ffee",
        model_class="LlamaForCausalLM",
        names_from="transformers",
        config=PissaConfig().model_dump(mode="json"),
        adapter_config={},
        shards=tuple(_shard(f"s{number}", matrices) for number in range(shards)),
        carried=(),
        index=None,
        side_files=(),
        left_out=(),
        refused=(),
        estimate=Estimate(read=0, written=0, adapter=0, peak_memory=0, peak_disk=0),
    )


def _shard(path: str, matrices: int) -> ShardPlan:
    return ShardPlan(
        path, 1000, tuple(_matrix(path, f"{path}.m{number}") for number in range(matrices))
    )


def _matrix(shard: str, name: str) -> Matrix:
    return Matrix(
        module=name,
        tensor=f"{name}.weight",
        shard=shard,
        dtype="F32",
        shape=(4, 4),
        start=0,
        stop=64,
        rank=2,
        scaling=1.0,
        transposed=False,
        key_a=f"{name}.lora_A.weight",
        key_b=f"{name}.lora_B.weight",
    )


def row(shard: str, number: int) -> dict[str, Any]:
    return {
        "module": f"{shard}.m{number}",
        "tensor": f"{shard}.m{number}.weight",
        "shard": shard,
        "shape": [4, 4],
        "rank": 2,
        "scaling": 1.0,
        "sigma": [1.0, 0.5],
        "energy": 0.5,
        "missed": 1e-6,
        "recombination_error": 1e-8,
    }


def take(tasks: TaskStore, job_id: str, task: str) -> Claim:
    claim = tasks.claim(job_id, task, holder=holder_id())
    assert claim is not None, f"{task} of {job_id} could not be claimed"
    return claim


def do_prepare(tasks: TaskStore, job_id: str, **shape: int) -> None:
    tasks.planned(take(tasks, job_id, "prepare"), make_plan(**shape), DIGEST)


def do_shard(tasks: TaskStore, job_id: str, index: int, *, matrices: int = 2) -> None:
    claim = take(tasks, job_id, f"shard:{index}")
    for number in range(matrices):
        tasks.matrix_done(claim, row(f"s{index}", number), nbytes=64, seconds=0.1, resumed=False)
    tasks.shard_done(
        claim, f"s{index}", nbytes=1000, matrices=matrices, resumed=False, peak=5000 + index
    )


def do_publish(tasks: TaskStore, job_id: str) -> None:
    claim = take(tasks, job_id, "publish")
    tasks.publishing(claim)
    result = {"output": "hf://org/name-pissa@1", "matrices": 4, "energy": 0.5}
    tasks.published(claim, result=result, manifest={"schema": 1, "matrices": []}, peak=4000)
    tasks.finish(claim)


def do_all(tasks: TaskStore, job_id: str) -> None:
    do_prepare(tasks, job_id)
    do_shard(tasks, job_id, 0)
    do_shard(tasks, job_id, 1)
    do_publish(tasks, job_id)
