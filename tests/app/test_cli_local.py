"""`pissa plan` and `pissa convert` as processes: results, refusals, interruption and resume."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from cli_tools import PATIENCE_S, PISSA, environment, pissa
from tinymodels import SHARDED, save_model
from transformers import LlamaConfig, LlamaForCausalLM

from pissa_core.adapters import open_source
from pissa_core.planning import make_plan
from pissa_core.refs import parse_ref
from pissa_core.spec import parse_config


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in several shards."""
    return save_model("llama", tmp_path_factory.mktemp("llama"), max_shard_size=SHARDED)


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one shard whose exact SVDs take seconds together."""
    folder = tmp_path_factory.mktemp("slow")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_plan_prints_the_object_of_post_v1_plans(llama: Path) -> None:
    done = pissa("plan", llama, "--rank", "4", "--json")
    assert done.returncode == 0
    made = make_plan(open_source(parse_ref(str(llama))), parse_config({"rank": 4}))
    assert json.loads(done.stdout) == made.public()


def test_plan_prints_a_table_on_stdout_and_progress_on_stderr(llama: Path) -> None:
    done = pissa("plan", f"./{llama.name}", cwd=llama.parent)
    assert done.returncode == 0
    assert done.stderr == "planning\n"
    assert "model.layers.*.self_attn.q_proj" in done.stdout
    assert "peak memory" in done.stdout


@pytest.mark.parametrize(
    ("limit", "code"),
    [("--disk-budget", "disk_too_small"), ("--memory-budget", "memory_too_small")],
)
def test_a_budget_that_cannot_hold_one_matrix_is_refused_by_the_plan_as_by_the_conversion(
    llama: Path, tmp_path: Path, limit: str, code: str
) -> None:
    planned = pissa("plan", llama, limit, "1000", "--json")
    converted = pissa("convert", llama, "--out", tmp_path / "out", limit, "1000", "--json")
    for done in (planned, converted):
        assert (done.returncode, done.stdout) == (1, "")
        assert f"error[{code}]: model" in done.stderr
    assert planned.stderr.partition("error[")[2] == converted.stderr.partition("error[")[2]
    assert not list(tmp_path.iterdir())


def test_a_refusal_is_in_the_plan_and_an_error(tmp_path: Path) -> None:
    model = save_model("gemma", tmp_path / "gemma")
    done = pissa("plan", model, "--target-modules", "q_proj,lm_head", "--rank", "4", "--json")
    assert done.returncode == 1
    shown = json.loads(done.stdout)
    assert [refusal["code"] for refusal in shown["refused"]] == ["tied_weight"]
    assert "error[tied_weight]: lm_head" in done.stderr

    out = tmp_path / "out"
    done = pissa("convert", model, "--out", out, "--target-modules", "q_proj,lm_head", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert "error[tied_weight]: lm_head" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gemma"]


@pytest.mark.parametrize(
    ("arguments", "code", "status"),
    [
        (["plan", "./nowhere"], "folder_not_found", 1),
        (["plan", "./empty"], "no_safetensors", 1),
        (["plan", "empty"], "hub_unavailable", 1),
        (["convert", "./empty", "--out", "./empty"], "output_is_source", 1),
        (["convert", "./empty", "--out", "./empty/in"], "output_inside_source", 1),
        (["convert", "./empty", "--out", "./full"], "output_exists", 1),
        (["convert", "./empty", "--out", "./o", "--device", "cuda:99"], "invalid_request", 2),
    ],
)
def test_what_cannot_be_is_an_error_with_its_code(
    tmp_path: Path, arguments: list[str], code: str, status: int
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    done = pissa(*arguments, cwd=tmp_path)
    assert done.stdout == ""
    assert f"\nerror[{code}]: " in f"\n{done.stderr}"
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def test_who_forgets_the_dot_before_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    done = pissa("plan", "model", cwd=tmp_path)
    assert done.returncode == 1
    assert "write ./model to mean it" in done.stderr


def test_convert_prints_the_result_as_json(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = pissa("convert", llama, "--out", out, "--rank", "4", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    manifest = json.loads((out / "pissa_manifest.json").read_bytes())
    assert result["output"] == str(out)
    assert result["manifest"] == str(out / "pissa_manifest.json")
    assert result["matrices"] == len(manifest["matrices"]) == 14
    for field in ("energy", "max_missed", "max_recombination_error"):
        assert result[field] == manifest["totals"][field]
    assert result["seconds"] == pytest.approx(sum(result["phase_seconds"].values()), abs=0.01)
    assert set(result["phase_seconds"]) == {"planning", "shards", "publishing"}
    assert result["peak_memory_bytes"] > 10**7
    assert result["passed"] is None
    lines = done.stderr.splitlines()
    assert lines[0] == "planning"
    assert lines[-1] == "publishing"
    assert any(line.startswith("converting: 14/14 matrices") for line in lines)


def test_what_has_no_effect_is_said_by_plan_and_conversion(llama: Path, tmp_path: Path) -> None:
    config = ("--target-modules", "q_proj", "--target-modules", "v_porj", "--rank", "4")
    note = "note: no module is named 'v_porj', as target_modules has it; similar names"
    planned = pissa("plan", llama, *config)
    converted = pissa("convert", llama, "--out", tmp_path / "out", *config, "--json")
    assert note in planned.stdout
    assert note in converted.stderr
    told = json.loads(converted.stdout)["notes"]
    assert note.removeprefix("note: ") in told[0]
    assert json.loads((tmp_path / "out" / "pissa_manifest.json").read_bytes())["notes"] == told
    verified = pissa("verify", "--original", llama, "--converted", tmp_path / "out")
    assert verified.returncode == 0, verified.stdout


def test_a_residual_that_is_converted_again_is_noticed(llama: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    first = pissa("convert", llama, "--out", once, "--rank", "4", "--json")
    second = pissa("convert", once, "--out", twice, "--rank", "4", "--json")
    assert json.loads(first.stdout)["notes"] == []
    assert "note: the model is itself a residual" in second.stderr
    assert json.loads(second.stdout)["matrices"] == 14


def test_convert_prints_how_to_load_the_result(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = pissa("convert", llama, "--out", "./out", "--rank", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"output                       {out}\n" in done.stdout
    snippet = done.stdout[done.stdout.index("from peft") :]
    loaded: dict[str, Any] = {}
    exec(snippet, loaded)
    assert sum(p.numel() for p in loaded["model"].parameters() if p.requires_grad) > 0


@contextmanager
def running(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """Run `pissa` and end it with the block, whatever happens."""
    with subprocess.Popen(
        [PISSA, *map(str, arguments)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell may have started us with Ctrl-C ignored, which is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, f"waited in vain for {what}"
        time.sleep(0.02)


def finished_matrices(out: Path) -> int:
    """Count the matrices in the journal of the conversion towards `out`."""
    journals = out.parent.glob(f".{out.name}.pissa-staging-*/work/*/*/journal")
    return sum(text.count(b'"row"') for text in (path.read_bytes() for path in journals))


def checksums(folder: Path) -> dict[str, str]:
    """Digest every file but the two that name the folder they lie in."""
    own_place = {"adapter_config.json", "pissa_manifest.json"}
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in own_place
    }


@pytest.fixture(scope="module")
def undisturbed(slow_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = pissa("convert", slow_model, "--out", out, "--svd-method", "exact")
    assert done.returncode == 0, done.stderr
    return checksums(out)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGTERM, signal.SIGKILL)),
    ],
)
def test_the_same_command_goes_on_after_an_interruption(
    slow_model: Path, tmp_path: Path, undisturbed: dict[str, str], number: signal.Signals
) -> None:
    out = tmp_path / "out"
    command = ["convert", slow_model, "--out", out, "--svd-method", "exact"]
    with running(*command, "--slots", "1") as process:
        wait_for(lambda: finished_matrices(out) >= 2, "two matrices")
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert stdout == ""
    assert not out.exists()
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert stderr.endswith("interrupted: the same command goes on where this one stopped\n")
        assert "Traceback" not in stderr

    done = pissa(*command)
    assert done.returncode == 0, done.stderr
    assert "matrices are done already" in done.stderr
    assert checksums(out) == undisturbed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("gap_s", [0.04, 0.15])
def test_ctrl_c_pressed_twice_is_one_interruption(
    slow_model: Path, tmp_path: Path, gap_s: float
) -> None:
    out = tmp_path / "out"
    command = ["convert", slow_model, "--out", out, "--svd-method", "exact"]
    with running(*command) as process:
        wait_for(lambda: finished_matrices(out) >= 2, "two matrices")
        process.send_signal(signal.SIGINT)
        time.sleep(gap_s)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, stderr
    assert stderr.endswith("interrupted: the same command goes on where this one stopped\n")
    assert "Traceback" not in stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_planning_child_ends_with_its_parent(
    slow_model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with running("convert", slow_model, "--out", tmp_path / "out") as process:
        parent = psutil.Process(process.pid)
        wait_for(lambda: bool(parent.children()), "the planning child")
        (child,) = parent.children()
        process.send_signal(number)
        process.communicate(timeout=PATIENCE_S)
    wait_for(lambda: _gone(child), "the end of the planning child")
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def _gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_an_orphan_planner_is_no_ones_process_group() -> None:
    # Ctrl-C on a terminal goes to the whole foreground group; the child must not be in it, or it
    # would print a traceback of its own over the parent's one sentence.
    from app.cli.planner import planning

    with planning("./nowhere", parse_config({})) as pending:
        assert os.getpgid(pending.child.process.pid) != os.getpgid(0)
