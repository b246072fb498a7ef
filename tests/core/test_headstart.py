"""What is computed before the plan is there is used where it fits, and changes no byte."""

from __future__ import annotations

import os
import shutil

import pytest
import tinymodels
import torch
from conversions import checksums, convert_to

from pissa_core import engine
from pissa_core.adapters import open_sink, open_source
from pissa_core.headstart import HeadStart
from pissa_core.planning import make_plan
from pissa_core.refs import LocalRef
from pissa_core.runtime import Runtime, resolve
from pissa_core.spec import parse_config
from pissa_core.split import matrix_seed
from pissa_core.svd import truncated_svd

CPU = Runtime(device="cpu", slots=2)


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    # On one core there is no head start: planning has it.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


def begun(folder, config):
    accepted = parse_config(config)
    source = open_source(LocalRef(str(folder)))
    return source, accepted, HeadStart(source, accepted, resolve(CPU))


@pytest.mark.parametrize("model", ["llama", "gpt2", "t5"])
def test_the_output_is_the_same_with_and_without(model, tmp_path):
    folder = tinymodels.save_model(model, tmp_path / "model", dtype="bf16")
    source, config, head_start = begun(folder, {"rank": 4})
    sink = open_sink(LocalRef(str(tmp_path / "out")), digest="0")
    list(engine.convert(source, sink, config, CPU, head_start=head_start))
    with_it = checksums(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    convert_to(folder, tmp_path / "out", {"rank": 4})
    assert with_it == checksums(tmp_path / "out")


def test_every_matrix_of_a_usual_model_is_guessed_and_right(tmp_path):
    folder = tinymodels.save_model("llama", tmp_path / "model", dtype="fp32")
    source, config, head_start = begun(folder, {"rank": 3, "svd": {"seed": 5}})
    for matrix in make_plan(source, config).matrices:
        found = head_start.take(matrix)
        assert found is not None
        weight = torch.empty(matrix.shape)
        source.read_into(matrix.shard, matrix.start, weight.view(-1).view(torch.uint8).numpy().data)
        seed = matrix_seed(5, matrix.tensor)
        wishes = {"method": "auto", "tolerance": config.svd.tolerance, "niter": 0, "seed": seed}
        torch.testing.assert_close(found.S, truncated_svd(weight, 3, **wishes).S)
        assert head_start.take(matrix) is None  # what was taken is let go


@pytest.mark.parametrize(
    "config",
    [
        {"rank": 2, "rank_pattern": {"q_proj": 3}},
        {"rank": 2, "svd": {"method": "exact"}},
        {"rank": 2, "target_modules": ["no_such_module"]},
    ],
)
def test_what_cannot_be_guessed_is_not_begun(config, tmp_path):
    folder = tinymodels.save_model("llama", tmp_path / "model", dtype="fp32")
    source, _, head_start = begun(folder, config)
    plan = make_plan(source, parse_config({"rank": 2}))
    assert [head_start.take(matrix) for matrix in plan.matrices] == [None] * len(plan.matrices)


def test_another_rank_is_not_taken(tmp_path):
    folder = tinymodels.save_model("llama", tmp_path / "model", dtype="fp32")
    source, _, head_start = begun(folder, {"rank": 2})
    for matrix in make_plan(source, parse_config({"rank": 3})).matrices:
        assert head_start.take(matrix) is None


def test_a_checkpoint_that_cannot_be_read_is_left_to_the_planner(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    _, _, head_start = begun(tmp_path, {"rank": 2})
    head_start.close()
