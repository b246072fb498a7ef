"""The config: PEFT's fields and meanings, each refusal naming field and value."""

from __future__ import annotations

import math

import pytest

from pissa_core.errors import InvalidConfig
from pissa_core.spec import PissaConfig, parse_config


def test_nothing_given_is_a_whole_config():
    config = parse_config({})
    assert (config.rank, config.alpha, config.target_modules) == (16, 16, "all-linear")
    assert (config.svd.method, config.rounding, config.adapter_dtype) == (
        "auto",
        "faithful",
        "float32",
    )


@pytest.mark.parametrize("data", [{}, {"init_lora_weights": "pissa_niter_4"}, {"lora_alpha": 8.5}])
def test_an_accepted_config_is_accepted_again_unchanged(data):
    config = parse_config(data)
    assert parse_config(config.model_dump(mode="json")) == config


def test_alpha_is_the_rank_unless_given():
    assert parse_config({"rank": 8}).model_dump()["lora_alpha"] == 8
    assert parse_config({"rank": 8, "lora_alpha": 3}).model_dump()["lora_alpha"] == 3
    assert PissaConfig(rank=4).lora_alpha == 4


def test_scaling_is_pefts():
    assert parse_config({"lora_alpha": 32}).scaling(16, 32) == 2.0
    assert parse_config({"use_rslora": True}).scaling(16, 32) == 32 / math.sqrt(16)


@pytest.mark.parametrize(
    ("spelled", "method", "niter"), [("pissa", "exact", 16), ("pissa_niter_7", "lowrank", 7)]
)
def test_peft_spelling_of_the_method(spelled, method, niter):
    config = parse_config({"init_lora_weights": spelled, "svd": {"seed": 3}})
    assert (config.svd.method, config.svd.niter, config.svd.seed) == (method, niter, 3)
    assert config.rounding == "faithful"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"rank": 0}, "rank: .*greater than or equal to 1.*got 0"),
        ({"rank": -4}, "got -4"),
        ({"rank": "four"}, r"^rank: a whole number is needed \(got 'four'\)$"),
        ({"layers_to_transform": ["x"]}, "^layers_to_transform.0: a whole number is needed"),
        ({"rank": True}, "rank: .*boolean"),
        ({"rank": 2.5}, r"rank: .*got 2\.5"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": math.inf}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"lora_alpha": 1e300}, "lora_alpha"),
        ({"alpha_pattern": {"q_proj": 1e300}}, "alpha_pattern"),
        ({"rank": 10**400}, "rank"),
        ({"r": 8}, "r: there is no such field"),
        ({"svd": {"tolerence": 1}}, "svd.tolerence: there is no such field"),
        ({"svd": {"method": "fast"}}, "svd.method: .*'auto', 'exact' or 'lowrank'"),
        ({"svd": {"tolerance": 0}}, "svd.tolerance"),
        ({"svd": {"tolerance": 1}}, "svd.tolerance"),
        ({"svd": {"niter": -1}}, "svd.niter"),
        ({"target_modules": []}, "empty list"),
        ({"target_modules": "("}, "not a regular expression"),
        ({"exclude_modules": "["}, "not a regular expression"),
        ({"rank_pattern": {"(": 4}}, "not a regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\.q_proj"),
        ({"alpha_pattern": {"q_proj": -1}}, r"alpha_pattern\.q_proj"),
        ({"layers_to_transform": [1]}, "needs target_modules as a list"),
        ({"target_modules": "q_proj", "layers_to_transform": 1}, "needs target_modules as a list"),
        ({"layers_pattern": "h"}, "without layers_to_transform"),
        ({"target_modules": ["q"], "layers_to_transform": [-1]}, "count from 0"),
        ({"init_lora_weights": "gaussian"}, "'pissa' and 'pissa_niter_N'"),
        ({"init_lora_weights": True}, "'pissa' and 'pissa_niter_N'"),
        ({"init_lora_weights": "pissa", "svd": {"method": "exact"}}, "already says svd.method"),
        ({"init_lora_weights": "pissa_niter_4", "svd": {"niter": 4}}, "already says svd.niter"),
        ({"rounding": "peft", "adapter_dtype": "bfloat16"}, "needs adapter_dtype='float32'"),
        ({"adapter_dtype": "float64"}, "adapter_dtype"),
        ({"task_type": "CHAT"}, "task_type"),
    ],
)
def test_refusals_name_the_field_and_the_value(data, says):
    with pytest.raises(InvalidConfig, match=says):
        parse_config(data)


def test_a_config_cannot_be_changed():
    config = PissaConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.rank = 4  # type: ignore[misc]
