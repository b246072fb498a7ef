"""`pissa to-base` killed with SIGKILL at chosen moments, run again, and compared byte for byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conversions import checksums, convert_to, fold_to


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A pair with matrices large enough to be killed between any two of them."""
    import transformers

    folder = tmp_path_factory.mktemp("killed")
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model", max_shard_size="40MB")
    convert_to(folder / "model", folder / "pair", {"rank": 8})
    return folder / "pair"


def start(pair: Path, output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "app.cli", "to-base", "--residual", str(pair)]
    command += ["--adapter", str(pair / "pissa_init"), "--out", str(output)]
    return subprocess.Popen(
        [*command, "--device", "cpu", "--slots", "1", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(output: Path) -> int:
    """Count the matrices that journals and seals tell of, as seen from outside."""
    count = 0
    for folder, _, names in os.walk(output.parent):  # which passes over what goes meanwhile
        staged = f".{output.name}.pissa-staging-" in folder
        for name in {"journal", "seal.json"} & set(names) if staged else ():
            with suppress(FileNotFoundError):
                count += Path(folder, name).read_text().count('"update"')
    return count


@pytest.mark.slow
def test_killed_twice_it_gives_the_undisturbed_bytes(pair, tmp_path):
    output = tmp_path / "plain"
    manifest = fold_to(pair, pair / "pissa_init", output)
    undisturbed = checksums(output)
    output.rename(tmp_path / "undisturbed")

    reached = []
    for matrices in (3, 12):
        process = start(pair, output)
        while process.poll() is None and finished(output) < matrices:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        reached.append(finished(output))
    process = start(pair, output)
    out, err = process.communicate()
    assert process.returncode == 0, err
    result = json.loads(out)
    assert reached == sorted(reached)
    assert reached[0] >= 1
    assert checksums(output) == undisturbed
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "undisturbed"}
    assert result["matrices"] == len(manifest["matrices"]) == 21
    assert result["max_ulps"] == manifest["totals"]["max_ulps"]
