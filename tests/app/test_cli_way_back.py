"""`pissa to-base` and `pissa verify` as processes: what they print, and how they end."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tinymodels
from conversions import convert_to

from app.cli import tables
from app.cli.verification import print_first_faults, print_report


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    model = tinymodels.save_model("gpt2", folder / "model", dtype="bf16")
    convert_to(model, folder / "pair", {"rank": 4})
    return folder


def pissa(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_to_base_prints_the_result(made, tmp_path, capsys):
    out = tmp_path / "plain"
    words = ("--residual", made / "pair", "--adapter", made / "pair/pissa_init", "--out", out)
    done = pissa("to-base", *words, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["output"] == str(out)
    assert (result["matrices"], result["passed"], result["energy"]) == (8, None, None)
    assert 0 < result["equal_weights"] < result["weights"]
    assert result["manifest"] == str(out / "pissa_manifest.json")
    assert "converting: 8/8 matrices" in done.stderr
    tables.print_folded(result)
    printed = capsys.readouterr().out
    assert "bit-equal to the original" in printed
    assert "units of the last place" in printed


def test_to_base_prints_how_to_load_the_result(made, tmp_path):
    out = tmp_path / "plain"
    adapter = made / "pair/pissa_init"
    done = pissa("to-base", "--residual", made / "pair", "--adapter", adapter, "--out", out)
    assert done.returncode == 0, done.stderr
    facts, _, snippet = done.stdout.partition("\n\n")
    assert "bit-equal to the original" in facts
    loaded: dict[str, Any] = {}
    exec(snippet, loaded)
    assert type(loaded["model"]).__name__ == "GPT2LMHeadModel"


def test_to_base_refuses_what_does_not_belong(made, tmp_path):
    words = ("--residual", made / "model", "--adapter", made / "pair/pissa_init")
    done = pissa("to-base", *words, "--out", tmp_path / "plain")
    assert done.returncode == 1
    assert "error[wrong_base]: the adapter was trained on" in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_to_base_without_an_adapter_is_a_usage_error(made, tmp_path):
    done = pissa("to-base", "--residual", made / "pair", "--out", tmp_path / "plain")
    assert done.returncode == 2
    assert "error[invalid_request]" in done.stderr


def test_verify_passes_with_a_table_and_status_0(made):
    done = pissa("verify", "--original", made / "model", "--converted", made / "pair")
    assert done.returncode == 0, done.stderr
    for check in ("manifest", "files", "side files", "adapter", "tensors", "targets", "figures"):
        assert f"\n{check} " in done.stdout
    assert "passed" in done.stdout
    assert "comparing: " in done.stderr


def test_verify_finds_a_fault_with_status_1(made, tmp_path, capsys):
    shutil.copytree(made / "pair", tmp_path / "pair")
    shard = tmp_path / "pair/model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 64
    shard.write_bytes(content)
    words = ("--original", made / "model", "--converted", tmp_path / "pair")
    done = pissa("verify", *words, "--json")
    assert done.returncode == 1
    assert "error" not in done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] is False
    assert report["totals"]["matrices"] == 8
    print_report(report)
    printed = capsys.readouterr().out
    assert "fault[files] model.safetensors: its sha256 is" in printed
    assert "NOT PASSED" in printed
    (files,) = (check for check in report["checks"] if check["name"] == "files")
    files["faults"], files["more_faults"] = files["faults"] * 30, 70
    print_report(report)
    printed = capsys.readouterr().out
    assert printed.count("fault[files] model.safetensors") == 10
    assert "fault[files] and 90 more; --json lists more of them" in printed


def test_verify_of_what_we_never_made_says_so_first(made, capsys):
    words = ("--original", made / "model", "--converted", made / "model")
    done = pissa("verify", *words, "--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["passed"] is False
    sentence = f"{made / 'model'} is no output of `pissa convert`: it has neither pissa_init/ nor "
    print_report(report)
    printed = capsys.readouterr().out
    assert printed.startswith(sentence)
    assert "the faults are those of any other model; --json lists them" in printed
    assert "fault[" not in printed
    print_first_faults(report)
    told = capsys.readouterr().out.splitlines()
    assert told[1].startswith(sentence)
    assert told[2:4] == [
        "fault[manifest] pissa_manifest.json: it is missing",
        f"fault[files] {report['checks'][1]['faults'][0]['where']}: it is missing",
    ]
    assert told[4] == "and 5 more, in the report under `checks`"


def test_verify_of_what_is_not_there_is_an_error(made, tmp_path):
    done = pissa("verify", "--original", tmp_path / "no", "--converted", made / "pair")
    assert done.returncode == 1
    assert "error[folder_not_found]" in done.stderr
    assert done.stdout == ""
