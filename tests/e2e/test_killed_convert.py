"""`pissa convert` killed with SIGKILL at chosen moments, run again, and compared byte for byte."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conversions import checksums, convert_to

pytestmark = pytest.mark.slow

CONFIG = {"rank": 8, "svd": {"method": "exact"}}
OPTIONS = ["--rank", "8", "--svd-method", "exact", "--device", "cpu", "--slots", "1", "--json"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Llama with enough matrices, large enough, to be killed between any two of them."""
    import transformers

    folder = tmp_path_factory.mktemp("killed") / "model"
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(model, tmp_path_factory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("killed") / "sharded"
    loaded = transformers.LlamaForCausalLM.from_pretrained(model)
    loaded.save_pretrained(folder, max_shard_size="3MB")
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


def start(model: Path, output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "app.cli", "convert", str(model), "--out", str(output)]
    return subprocess.Popen(
        [*command, *OPTIONS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def progress(output: Path) -> int:
    """Count what a conversion has finished, as its staging area shows it from outside."""
    staging = list(output.parent.glob(f".{output.name}.pissa-staging-*"))
    journals = [path for folder in staging for path in folder.glob("work/*/*/journal")]
    seals = [path for folder in staging for path in folder.glob("sealed/*/seal.json")]
    count = 0
    for path in (*journals, *seals):
        try:
            text = path.read_text()
        except FileNotFoundError:
            continue
        count += text.count('"done"') if path.name == "journal" else text.count('"energy"')
    return count


def kill_at(model: Path, output: Path, matrices: int) -> None:
    process = start(model, output)
    while process.poll() is None and progress(output) < matrices:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def resumed_run(model: Path, output: Path) -> dict:
    process = start(model, output)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return json.loads(out)


@pytest.mark.parametrize("checkpoint", ["model", "sharded"])
def test_killed_again_and_again_gives_the_undisturbed_bytes(request, tmp_path, checkpoint):
    folder = request.getfixturevalue(checkpoint)
    output = tmp_path / "out"
    manifest = convert_to(folder, output, CONFIG)
    undisturbed = checksums(output)
    output.rename(tmp_path / "undisturbed")

    reached = []
    for matrices in (3, 14):
        kill_at(folder, output, matrices)
        reached.append(progress(output))
        assert not output.exists()
    assert reached == sorted(reached)
    assert reached[0] >= 1
    resumed_run(folder, output)
    assert checksums(output) == undisturbed
    assert len(manifest["matrices"]) == 21
    assert {path.name for path in tmp_path.iterdir()} == {"out", "undisturbed"}


def test_what_was_finished_is_not_done_again(model, tmp_path):
    output = tmp_path / "out"
    kill_at(model, output, 10)
    (journal,) = output.parent.glob(".out.pissa-staging-*/work/*/*/journal")
    finished = {line for line in journal.read_text().splitlines() if '"done"' in line}
    process = start(model, output)
    seen = ""
    while process.poll() is None and progress(output) <= len(finished):
        time.sleep(0.001)
    if journal.exists():
        seen = journal.read_text()
    _out, err = process.communicate()
    assert process.returncode == 0, err
    begun_twice = [
        line for line in finished if seen.count(json.dumps({"begin": json.loads(line)["done"]})) > 1
    ]
    assert seen
    assert begun_twice == []


def test_killed_while_publishing_shows_all_or_nothing(model, tmp_path):
    output = tmp_path / "out"
    convert_to(model, output, CONFIG)
    undisturbed = checksums(output)
    output.rename(tmp_path / "undisturbed")
    for _ in range(3):
        process = start(model, output)
        while process.poll() is None and not list(tmp_path.glob(".out.*/tree-*")):
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if output.exists():
            assert checksums(output) == undisturbed
            break
    if not output.exists() or list(tmp_path.glob(".out.*")):
        resumed_run(model, output)
    assert checksums(output) == undisturbed
    assert not list(tmp_path.glob(".out.*"))
