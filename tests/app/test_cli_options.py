"""Config options say the same as the object that REST takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from app.cli.kinds import Size
from app.cli.options import config_options, settings
from pissa_core.errors import InvalidConfig
from pissa_core.spec import PissaConfig, parse_config


def merged_from(*arguments: str) -> dict[str, Any]:
    """Parse arguments as `plan` and `convert` do, and return the object REST would get."""
    seen: dict[str, Any] = {}

    @click.command()
    @config_options
    def command(pissa: dict[str, Any]) -> None:
        seen.update(pissa)

    result = CliRunner().invoke(command, arguments, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return seen


SPELLINGS: list[tuple[list[str], dict[str, Any]]] = [
    ([], {}),
    (["--rank", "8"], {"rank": 8}),
    (["--lora-alpha", "32"], {"lora_alpha": 32}),
    (["--lora-alpha", "0.5"], {"lora_alpha": 0.5}),
    (["--use-rslora"], {"use_rslora": True}),
    (["--no-use-rslora"], {"use_rslora": False}),
    (["--target-modules", "q_proj,v_proj"], {"target_modules": ["q_proj", "v_proj"]}),
    (["--target-modules", "q_proj"], {"target_modules": ["q_proj"]}),
    (["--target-modules", "self_attn.q_proj"], {"target_modules": ["self_attn.q_proj"]}),
    (
        ["--target-modules", "q_proj", "--target-modules", "k_proj, v_proj"],
        {"target_modules": ["q_proj", "k_proj", "v_proj"]},
    ),
    (["--target-modules", r".*\.q_proj"], {"target_modules": r".*\.q_proj"}),
    (["--target-modules", "all-linear"], {"target_modules": "all-linear"}),
    (["--exclude-modules", ".*lm_head"], {"exclude_modules": ".*lm_head"}),
    (["--exclude-modules", "lm_head"], {"exclude_modules": ["lm_head"]}),
    (
        ["--target-modules", "q_proj", "--layers-to-transform", "0,2"],
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    ),
    (
        ["--target-modules", "q", "--layers-to-transform", "1", "--layers-pattern", "h,layers"],
        {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    ),
    (["--rank-pattern", '{"q_proj": 8}'], {"rank_pattern": {"q_proj": 8}}),
    (["--alpha-pattern", '{"q_proj": 0.5}'], {"alpha_pattern": {"q_proj": 0.5}}),
    (["--svd-method", "exact"], {"svd": {"method": "exact"}}),
    (
        ["--svd-tolerance", "1e-4", "--svd-seed", "1", "--svd-niter", "4"],
        {"svd": {"tolerance": 1e-4, "seed": 1, "niter": 4}},
    ),
    (["--init-lora-weights", "pissa_niter_4"], {"init_lora_weights": "pissa_niter_4"}),
    (["--rounding", "peft"], {"rounding": "peft"}),
    (["--adapter-dtype", "bfloat16"], {"adapter_dtype": "bfloat16"}),
    (["--task-type", "SEQ_CLS"], {"task_type": "SEQ_CLS"}),
]


@pytest.mark.parametrize(("arguments", "expected"), SPELLINGS, ids=lambda value: str(value))
def test_an_option_says_what_the_json_says(arguments: list[str], expected: dict[str, Any]) -> None:
    given = merged_from(*arguments)
    assert given == expected
    assert parse_config(given) == parse_config(expected)


def test_every_field_of_the_config_has_an_option_and_a_test() -> None:
    spelled = {word for arguments, _ in SPELLINGS for word in arguments if word.startswith("--")}
    assert {setting.flag for setting in settings()} <= spelled
    leaves = {setting.path[0] for setting in settings()}
    assert leaves == set(PissaConfig.model_fields)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_config_file_is_the_rest_object_and_options_win(tmp_path: Path, suffix: str) -> None:
    content = {"rank": 4, "lora_alpha": 8, "svd": {"method": "lowrank", "niter": 2, "seed": 7}}
    file = tmp_path / f"config.{suffix}"
    text = {
        "json": json.dumps(content),
        "yaml": "rank: 4\nlora_alpha: 8\nsvd: {method: lowrank, niter: 2, seed: 7}\n",
    }
    file.write_text(text[suffix])
    assert merged_from("--config", str(file)) == content
    given = merged_from("--config", str(file), "--rank", "6", "--svd-niter", "3")
    assert given == {**content, "rank": 6, "svd": {**content["svd"], "niter": 3}}


def test_a_yaml_exponent_is_a_number(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("svd:\n  tolerance: 1e-3\n")
    assert parse_config(merged_from("--config", str(file))).svd.tolerance == 1e-3


@pytest.mark.parametrize(
    ("content", "arguments", "method", "niter"),
    [
        ({"init_lora_weights": "pissa"}, ["--svd-method", "auto"], "auto", 16),
        ({"svd": {"method": "exact"}}, ["--init-lora-weights", "pissa_niter_3"], "lowrank", 3),
    ],
)
def test_the_method_given_as_an_option_wins_in_either_spelling(
    tmp_path: Path, content: dict[str, Any], arguments: list[str], method: str, niter: int
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content))
    config = parse_config(merged_from("--config", str(file), *arguments))
    assert (config.svd.method, config.svd.niter) == (method, niter)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rank-pattern", "q_proj=8"], "--rank-pattern 'q_proj=8' is not JSON"),
        (["--rank-pattern", "[1]"], "is JSON, but not an object"),
        (["--target-modules", "a,.*b"], "'.*b' in a list is no path ending"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(arguments: list[str], words: str) -> None:
    with pytest.raises(InvalidConfig) as refusal:
        merged_from(*arguments)
    assert words in refusal.value.message


@pytest.mark.parametrize("content", ["- rank\n- 4\n", "rank: [", "", "{'rank': 4"])
def test_a_config_file_that_holds_no_object_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content)
    with pytest.raises(InvalidConfig, match=r"config\.yaml"):
        merged_from("--config", str(file))


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("4GB", 4 * 10**9), ("4GiB", 4 * 2**30), ("512", 512), ("1.5 kB", 1500)],
)
def test_sizes_are_read_as_people_write_them(text: str, nbytes: int) -> None:
    assert Size().convert(text, None, None) == nbytes


@pytest.mark.parametrize("text", ["", "big", "0", "-1", "4 lightyears", "nan"])
def test_a_size_that_is_none_is_a_usage_error(text: str) -> None:
    with pytest.raises(click.UsageError, match="is not a size"):
        Size().convert(text, None, None)
