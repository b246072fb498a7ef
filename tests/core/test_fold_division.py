"""A residual's giant shard becomes several on the way back: the same tensors, elsewhere."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tinymodels
import torch
from conversions import convert_to, fold_to
from fold_tools import load, retrained, weights_of
from worker_tools import write_llama

from pissa_core.adapters import open_source
from pissa_core.adapters.local import LocalSource
from pissa_core.admission import check_budgets
from pissa_core.budgets import publish_bytes
from pissa_core.errors import DiskTooSmall, MemoryTooSmall, WrongBase
from pissa_core.fold.planning import make_fold_plan
from pissa_core.plan import IN_FLIGHT, Plan
from pissa_core.workbench import scratch_bytes

BUDGET = {"disk_budget": 100_000}
"""Less than a tiny model's one shard, and more than its largest tensor."""


def converted(name: str, folder: Path) -> Path:
    """Return the PiSSA form, one file of weights, of a tiny model beside it."""
    model = tinymodels.save_model(name, folder / "model")
    convert_to(model, folder / "pair", {"rank": 4, **tinymodels.task_of(name)})
    assert len(list((folder / "pair").glob("*.safetensors"))) == 1
    return folder / "pair"


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("llama", {"modules_to_save": ["norm", "lm_head"]}),
        ("gpt2", {"bias": "all"}),
        ("roberta-cls", {}),
    ],
)
def test_a_divided_fold_has_the_tensors_of_an_undivided_one(name, more, tmp_path):
    pair = converted(name, tmp_path)
    adapter = retrained(pair, tmp_path / "trained", **more)

    divided = fold_to(pair, adapter, tmp_path / "divided", limits=BUDGET)
    whole = fold_to(pair, adapter, tmp_path / "whole")

    found, expected = weights_of(tmp_path / "divided"), weights_of(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert divided["replaced"] == whole["replaced"]
    assert bool(divided["replaced"]) == bool(more or name == "roberta-cls")
    names = sorted(path.name for path in (tmp_path / "divided").glob("*.safetensors"))
    assert names == [f"model-{i + 1:05}-of-{len(names):05}.safetensors" for i in range(len(names))]
    assert len(names) > 3
    assert {row["shard"] for row in divided["matrices"]} <= set(names)
    index = "model.safetensors.index.json"
    weight_map = json.loads((tmp_path / "divided" / index).read_text())["weight_map"]
    assert weight_map.keys() == found.keys()
    assert index in divided["files"]
    mine, theirs = (load(tmp_path / side).state_dict() for side in ("divided", "whole"))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_a_plan_says_what_is_divided_and_what_the_disk_holds(tmp_path):
    model = write_llama(tmp_path / "model", hidden=256, shards=1)
    pair = tmp_path / "pair"
    convert_to(model, pair, {"rank": 4})
    sources = LocalSource(pair), LocalSource(pair / "pissa_init")
    whole = make_fold_plan(*sources, open_source)
    limits = {"disk_budget": 3_000_000, "scratch": tmp_path / "scratch"}
    plan = make_fold_plan(*sources, open_source, **limits)

    into = [shard.path for shard in plan.shards]
    (giant,) = whole.shards
    assert plan.public()["divided"] == [{"shard": giant.path, "into": into}]
    again = Plan.from_json(plan.to_json())
    assert (again.division, again.fold) == (plan.division, plan.fold)
    needs = sorted((scratch_bytes(plan, shard) for shard in plan.shards), reverse=True)
    assert sum(needs[:IN_FLIGHT]) <= limits["disk_budget"]
    sizes = {path: info.size for path, info in sources[0].files().items()}
    assert plan.estimate.peak_disk == max(sum(needs[:IN_FLIGHT]), publish_bytes(plan, sizes, 0))
    header = int.from_bytes((pair / giant.path).read_bytes()[:8], "little") + 8
    index = (pair / "model.safetensors.index.json").stat().st_size  # replaced, so it is not read
    assert plan.estimate.read == whole.estimate.read - header - index


def test_a_divided_residual_that_was_altered_is_found_by_one_reading(tmp_path, monkeypatch):
    pair = converted("llama", tmp_path)
    path = pair / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(WrongBase, match=r"model\.safetensors .*manifest"):
        fold_to(pair, pair / "pissa_init", tmp_path / "plain", limits=BUDGET)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "pair"}

    content[-1] ^= 1
    path.write_bytes(content)
    from pissa_core.fold import work

    asked = []
    check = work.check_is_listed
    monkeypatch.setattr(
        work, "check_is_listed", lambda *args: (asked.append(args[1]), check(*args))
    )
    fold_to(pair, pair / "pissa_init", tmp_path / "plain", limits=BUDGET)
    assert asked == ["model.safetensors"]


@pytest.mark.parametrize(
    ("limits", "error", "told"),
    [
        ({"disk_budget": 20_000}, DiskTooSmall, r"model-0000.* disk budget is 20,000"),
        ({"memory_budget": 1000}, MemoryTooSmall, r"bytes in flight .* memory budget is 1,000"),
    ],
)
def test_a_plan_refuses_a_budget_that_cannot_hold_one_tensor(tmp_path, limits, error, told):
    pair = converted("llama", tmp_path)
    residual, adapter = LocalSource(pair), LocalSource(pair / "pissa_init")
    plan = make_fold_plan(residual, adapter, open_source, **limits)
    with pytest.raises(error, match=told):
        check_budgets(plan, residual, **limits)


def test_a_plan_for_the_hub_wants_room_for_the_small_files_of_its_last_commit(tmp_path):
    pair = converted("llama", tmp_path)
    residual, adapter = LocalSource(pair), LocalSource(pair / "pissa_init")
    limits = {"disk_budget": 100_000, "scratch": tmp_path / "scratch"}
    plan = make_fold_plan(residual, adapter, open_source, **limits)
    with pytest.raises(DiskTooSmall, match="disk budget is 100,000"):
        check_budgets(plan, residual, **limits)


def test_an_adapter_of_whole_weights_alone_fits_any_memory(tmp_path):
    pair = converted("llama", tmp_path)
    residual, adapter = LocalSource(pair), LocalSource(pair / "pissa_init")
    plan = make_fold_plan(residual, adapter, open_source)
    bare = dataclasses.replace(
        plan, shards=tuple(dataclasses.replace(shard, matrices=()) for shard in plan.shards)
    )
    check_budgets(bare, residual, memory_budget=1)


def test_a_tensor_that_does_not_fit_is_refused_before_any_work(tmp_path):
    pair = converted("llama", tmp_path)
    with pytest.raises(DiskTooSmall, match=r"model-0000.* disk budget is 20,000"):
        fold_to(
            pair,
            pair / "pissa_init",
            tmp_path / "plain",
            limits={"disk_budget": 20_000},
            disk_budget=20_000,
        )
    assert not (tmp_path / "plain").exists()
