"""From Hub to Hub with less disk than a shard takes: other files, the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hub.giants import Llama
from huggingface_hub import snapshot_download
from safetensors.torch import load_file

from pissa_core.adapters import staging_digest
from pissa_core.engine import convert
from pissa_core.planning import make_plan
from pissa_core.runtime import Runtime
from pissa_core.spec import parse_config

TINY = Llama(4, 64, 224, heads=8, kv_heads=1, vocabulary=320, shard_size=300_000)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("cross_repo", [True, False])
def test_a_giant_in_pieces_is_the_same_model(hub, open_hub, open_hub_sink, tmp_path, cross_repo):
    hub.cross_repo = cross_repo
    files = TINY.files()
    hub.create_repo("big/llama", files=files)
    largest = max(blob.size for blob in files.values())
    token = hub.create_token("me")
    source = open_hub("big/llama")
    config = parse_config({"rank": 2, "layers_to_transform": [1], "target_modules": TARGETS})
    plan = make_plan(source, config, disk_budget=largest * 3 // 4)
    digest = staging_digest(source, config, "hf://me/llama", plan.division)
    sink = open_hub_sink("hf://me/llama", token, digest=digest)
    assert len(plan.shards) > len(TINY.shards())
    renumbered = {
        shard: hub.sent_bytes(f"big/llama/{shard.source_path}")
        for shard in plan.shards
        if shard.run is None and not shard.matrices
    }
    assert renumbered
    for _ in convert(source, sink, config, Runtime(device="cpu", slots=1), plan=plan):
        pass
    assert not [path for path in (tmp_path / "here").rglob("*") if path.is_file()]
    assert set(hub.uploads.finished.values()) == {1}
    for shard, before in renumbered.items():
        sent = hub.sent_bytes(f"big/llama/{shard.source_path}") - before
        assert sent == (0 if cross_repo else shard.size)
    down = snapshot_download("me/llama", endpoint=hub.endpoint, local_dir=tmp_path / "down")
    assert_same_model(files, Path(down))


def assert_same_model(files, folder):
    (folder / "source").mkdir()
    wanted = {}
    for path, blob in files.items():
        if path.endswith(".safetensors"):
            (folder / "source" / path).write_bytes(blob.read(0, blob.size))
            wanted |= load_file(folder / "source" / path)
    found = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    factors = load_file(folder / "pissa_init" / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    for name, W in wanted.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" not in factors:
            assert torch.equal(found[name], W)
            continue
        product = factors[f"{key}.lora_B.weight"] @ factors[f"{key}.lora_A.weight"]
        R = found[name].float()
        # One rounding to bfloat16, of R: half a unit in its last place, 2^-8 of it.
        assert torch.all((R + product - W.float()).abs() <= 2**-8 * R.abs() + 1e-6)
    assert len(factors) == 2 * len(TARGETS)
