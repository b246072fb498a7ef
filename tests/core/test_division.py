"""A shard that the disk cannot hold becomes several: the same tensors, bit for bit, elsewhere."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tinymodels
import torch
from safetensors.torch import load_file
from worker_tools import write_llama

from pissa_core.adapters import staging_digest
from pissa_core.adapters.local import LocalSink, LocalSource
from pissa_core.admission import check_budgets, check_plan
from pissa_core.budgets import publish_bytes
from pissa_core.engine import convert
from pissa_core.errors import DiskTooSmall, MemoryTooSmall, PissaError
from pissa_core.plan import IN_FLIGHT, Plan
from pissa_core.planning import make_plan
from pissa_core.runtime import Runtime
from pissa_core.spec import parse_config
from pissa_core.workbench import scratch_bytes

BUDGET = 100_000
"""Less than a tiny model's one shard takes with its factors, and more than its largest tensor."""


class Download(LocalSource):
    """A folder that is read as a download is: what was fetched serves as its own original."""

    rereads = False

    def fetch(self, path, destination, *, holes=()):
        return super().fetch(path, destination)


def plan_of(source: LocalSource, task: str | None = None, **limits: Any) -> Plan:
    return make_plan(source, parse_config({"rank": 2, "task_type": task}), **limits)


def tensors_below(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def converted(source: LocalSource, out: Path, plan: Plan) -> dict[str, torch.Tensor]:
    digest = staging_digest(source, parse_config(plan.config), str(out), plan.division)
    sink = LocalSink(out, digest=digest)
    config = parse_config(plan.config)
    for _ in convert(source, sink, config, Runtime(device="cpu", slots=1), plan=plan):
        pass
    return tensors_below(out)


@pytest.mark.parametrize("kind", [LocalSource, Download])
@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta-cls"])
def test_a_divided_conversion_has_the_tensors_of_an_undivided_one(name, kind, tmp_path):
    source = kind(tinymodels.save_model(name, tmp_path / "model"))
    task = tinymodels.task_of(name).get("task_type")
    divided, whole = plan_of(source, task, disk_budget=BUDGET), plan_of(source, task)
    assert len(divided.shards) > 3
    assert whole.division is None

    found = converted(source, tmp_path / "divided", divided)
    expected = converted(source, tmp_path / "whole", whole)

    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    adapter = Path("pissa_init/adapter_model.safetensors")
    ours, theirs = (
        load_file(tmp_path / "divided" / adapter),
        load_file(tmp_path / "whole" / adapter),
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_output_shards_are_named_and_indexed_as_transformers_does(tmp_path):
    source = LocalSource(tinymodels.save_model("llama", tmp_path / "model"))
    plan = plan_of(source, disk_budget=BUDGET)
    converted(source, tmp_path / "out", plan)

    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    n = len(names)
    assert names == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    assert [shard.path for shard in plan.shards] == names
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        key: name for name in names for key in load_file(tmp_path / "out" / name)
    }
    tensors = tensors_below(tmp_path / "model").values()
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in tensors)}
    model = type(tinymodels.make_model("llama")).from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 2
    head = (tmp_path / "out" / names[0]).read_bytes()
    length = int.from_bytes(head[:8], "little")
    assert json.loads(head[8 : 8 + length])["__metadata__"] == {"format": "pt"}


def test_runs_keep_within_both_limits_unless_one_tensor_is_larger(tmp_path):
    source = LocalSource(tinymodels.save_model("llama", tmp_path / "model"))
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    largest = max(tensor.nbytes for tensor in tensors_below(tmp_path / "model").values())

    by_size = plan_of(source, disk_budget=3 * size, max_shard_size=largest)
    assert by_size.division is None  # it fits, so it stays whole

    plan = plan_of(source, disk_budget=BUDGET, max_shard_size=largest - 1)
    counts = [len(json.loads(shard.run.header)) - 1 for shard in plan.shards if shard.run]
    assert all(
        shard.size < largest or count == 1 for shard, count in zip(plan.shards, counts, strict=True)
    )
    assert max(shard.size for shard in plan.shards) > largest
    looser = plan_of(source, disk_budget=BUDGET)
    in_flight = sorted((scratch_bytes(looser, shard) for shard in looser.shards), reverse=True)
    assert sum(in_flight[:IN_FLIGHT]) <= BUDGET
    assert plan.division != looser.division


def test_shards_that_fit_stay_whole_beside_one_that_is_divided(tmp_path):
    folder = tinymodels.save_model("llama", tmp_path / "model", max_shard_size="60KB")
    source = LocalSource(folder)
    whole = plan_of(source)
    needs = sorted(scratch_bytes(whole, shard) for shard in whole.shards)
    assert needs[-2] < needs[-1]

    plan = plan_of(source, disk_budget=needs[-1] - 1)

    kept = [shard for shard in plan.shards if shard.run is None]
    assert len(kept) == len(whole.shards) - 1
    assert len(plan.public()["divided"]) == 1
    found = converted(source, tmp_path / "divided", plan)
    expected = converted(source, tmp_path / "whole", whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for shard in kept:
        there = (tmp_path / "whole" / shard.source_path).read_bytes()
        assert (tmp_path / "divided" / shard.path).read_bytes() == there


def test_a_divided_plan_survives_json_and_says_what_is_divided(tmp_path):
    source = LocalSource(tinymodels.save_model("roberta-cls", tmp_path / "model"))
    plan = plan_of(source, "SEQ_CLS", disk_budget=BUDGET)
    again = Plan.from_json(plan.to_json())
    assert again == replace(plan, config=again.config, adapter_config=again.adapter_config)
    assert again.division == plan.division is not None
    into = [shard.path for shard in plan.shards]
    assert plan.public()["divided"] == [{"shard": "model.safetensors", "into": into}]
    whole = plan_of(source, "SEQ_CLS").estimate
    header = int.from_bytes(source.read("model.safetensors", 0, 8), "little") + 8
    assert plan.estimate.read == whole.read - header


def test_on_the_way_to_the_hub_the_disk_holds_what_is_under_way(tmp_path):
    source = LocalSource(write_llama(tmp_path / "model", hidden=256, shards=1))
    plan = plan_of(source, disk_budget=3_000_000, scratch=tmp_path / "scratch")
    needs = sorted((scratch_bytes(plan, shard) for shard in plan.shards), reverse=True)
    sizes = {path: info.size for path, info in source.files().items()}
    last = publish_bytes(plan, sizes, plan.estimate.adapter)
    assert plan.division is not None
    assert plan.estimate.peak_disk == max(sum(needs[:IN_FLIGHT]), last)

    whole = plan_of(source, scratch=tmp_path / "scratch")  # all that is free is the budget
    assert whole.division is None
    alone = scratch_bytes(whole, whole.shards[0])
    assert whole.estimate.peak_disk == max(alone, last)
    assert plan_of(source).estimate.peak_disk > whole.estimate.read


def test_the_one_file_that_config_json_names_must_stay_one(tmp_path):
    folder = tinymodels.save_model("llama", tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    tinymodels.edit_config(folder, transformers_weights="weights.safetensors")
    with pytest.raises(DiskTooSmall, match=r"weights\.safetensors has .* config\.json names"):
        plan_of(LocalSource(folder), disk_budget=BUDGET)


def least_that_would_do(error: PissaError) -> int:
    found = re.search(r"--disk-budget (\d+) ", error.hint or "")
    assert found is not None
    return int(found[1])


def refuse(source: LocalSource, plan: Plan | None = None, **limits: Any) -> None:
    """Plan, unless there is a plan, and check it against the same limits."""
    check_budgets(plan or plan_of(source, **limits), source, **limits)


@pytest.mark.parametrize("goes_to_the_hub", [False, True])
def test_a_plan_refuses_a_budget_that_is_too_small_and_tells_the_least_that_would_do(
    tmp_path, goes_to_the_hub
):
    source = LocalSource(tinymodels.save_model("llama", tmp_path / "model"))
    scratch = tmp_path / "scratch" if goes_to_the_hub else None

    with pytest.raises(DiskTooSmall, match=r"the largest piece that model\.safetensors") as found:
        refuse(source, disk_budget=1000, scratch=scratch)

    least = least_that_would_do(found.value)
    refuse(source, disk_budget=least, scratch=scratch)
    with pytest.raises(DiskTooSmall) as nearly:
        refuse(source, disk_budget=least - 1, scratch=scratch)
    assert least_that_would_do(nearly.value) == least
    what = "the adapter, one file," if goes_to_the_hub else "the largest piece"
    assert what in nearly.value.message  # the adapter's file passes through on the way to the Hub


def test_what_is_refused_for_other_reasons_is_told_before_the_budget(tmp_path):
    source = LocalSource(tinymodels.save_model("llama", tmp_path / "model"))
    config = parse_config({"rank": 2, "rank_pattern": {"q_proj": 4096}})
    refused = make_plan(source, config)
    assert refused.refused
    refuse(source, refused, disk_budget=1000, memory_budget=1000)


def test_work_begins_only_if_there_is_still_room_for_its_largest_piece(tmp_path):
    source = LocalSource(tinymodels.save_model("llama", tmp_path / "model"))
    plan = plan_of(source)
    sink = LocalSink(
        tmp_path / "out", digest=staging_digest(source, parse_config(plan.config), "o")
    )
    with pytest.raises(DiskTooSmall, match=r"model\.safetensors needs .* disk budget is 1,000"):
        check_plan(plan, source, sink, Runtime(disk_budget=1000))


def test_a_plan_refuses_a_matrix_that_the_memory_budget_cannot_hold(tmp_path):
    source = LocalSource(tinymodels.save_model("llama", tmp_path / "model"))
    with pytest.raises(MemoryTooSmall, match=r"needs [\d,]+ bytes in flight .* budget is 1,000"):
        refuse(source, memory_budget=1000)
