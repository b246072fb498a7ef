"""`pissa to-lora`: what it prints, and how it ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tinymodels
from cli_tools import pissa
from conversions import convert_to
from lora_tools import config, edit_config, edit_weights

from app.cli.tables import lora_snippet


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A pair, and a trained adapter beside it."""
    folder = tmp_path_factory.mktemp("pair")
    tinymodels.save_model("llama", folder / "base")
    convert_to(folder / "base", folder / "pair", {"rank": 4, "target_modules": ["q_proj"]})
    shutil.copytree(folder / "pair" / "pissa_init", folder / "trained")
    edit_weights(folder / "trained", lambda all_: {k: 1.5 * t for k, t in all_.items()})
    return folder


def test_the_result_and_what_was_found_are_said(pair, tmp_path):
    done = pissa("to-lora", "--trained", pair / "trained", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "none, it is exact" in done.stdout
    assert f'base = AutoModelForCausalLM.from_pretrained("{pair / "base"}")' in done.stdout
    assert f"note: the original base is {pair / 'base'}" in done.stderr
    assert "converting: 2/2 matrices" in done.stderr
    assert config(tmp_path / "out")["r"] == 8


def test_as_json_with_options(pair, tmp_path):
    words = ["--trained", pair / "trained", "--initial", pair / "pair", "--out", tmp_path / "out"]
    done = pissa("to-lora", *words, "--rank", "3", "--tolerance", "0.5", "--uniform", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["output"] == str(tmp_path / "out")
    assert result["base"] == str(pair / "base")
    assert result["largest_rank"] <= 3
    assert 0 < result["max_lost"] <= 0.5
    assert json.loads(Path(result["manifest"]).read_text())["config"]["uniform"] is True


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "Missing option '--trained'"),
        (["--rank", "0"], "--rank: it must be greater than or equal to 1 (got 0)"),
        (["--tolerance", "1"], "--tolerance: it must be less than 1 (got 1.0)"),
        (["--trained", "no such ref"], "is not a Hub reference"),
        (["--private"], "--private is about an output on the Hub"),
    ],
)
def test_what_the_request_alone_shows_is_refused(words, told, tmp_path):
    trained = [] if not words or "--trained" in words else ["--trained", "./nowhere"]
    done = pissa("to-lora", *trained, *words, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert told in done.stderr


def test_adapters_that_do_not_match_end_with_1_and_leave_nothing(pair, tmp_path):
    other = shutil.copytree(pair / "trained", tmp_path / "other")
    edit_config(other, lora_alpha=40)
    done = pissa("to-lora", "--trained", other, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2].startswith("error[adapters_do_not_match]: model.layers.0")
    assert done.stderr.splitlines()[-1].startswith("hint: lora_alpha, alpha_pattern and use_rslora")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize(
    "words", [["--trained", "trained"], ["--trained", "./trained", "--initial", "pair"]]
)
def test_who_writes_a_folder_as_a_repo_is_told_how_folders_are_written(pair, tmp_path, words):
    done = pissa("to-lora", *words, "--out", tmp_path / "out", cwd=pair)
    assert done.returncode == 1
    assert f"there is a folder {words[-1]} here; write ./{words[-1]} to mean it" in done.stderr


def test_the_snippet_of_an_adapter_on_the_hub_names_repo_and_revision():
    told = lora_snippet("hf://me/lora@abc123", "org/name", None, "AutoModelForCausalLM")
    assert told.splitlines()[-2:] == [
        'base = AutoModelForCausalLM.from_pretrained("org/name")',
        'model = PeftModel.from_pretrained(base, "me/lora", revision="abc123")',
    ]
