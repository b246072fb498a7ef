"""Stock PEFT as the oracle: the same keys, factors and residuals, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import tinymodels
import torch
import transformers
from conversions import convert_to
from safetensors.torch import load_file

RANK = 4
HEADS = {"TOKEN_CLS": ["classifier"], "QUESTION_ANS": ["qa_outputs"]}
CASES = [
    (name, dtype, shards)
    for name in tinymodels.MODELS
    for dtype in tinymodels.DTYPES
    for shards in (None, tinymodels.SHARDED)
]


@pytest.fixture(autouse=True)
def one_thread():
    """PEFT under the thread count we document: LAPACK's last bits depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def what_to_convert(name: str) -> dict[str, object]:
    """All linear layers, but for Mixtral the attention alone and for heads PEFT's task type."""
    if name == "mixtral":
        return {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    return tinymodels.task_of(name)


def load_original(folder: Path) -> torch.nn.Module:
    config = json.loads((folder / "config.json").read_text())
    return getattr(transformers, config["architectures"][0]).from_pretrained(folder)


def peft_pissa(folder: Path, targets: dict, task_type: str | None) -> torch.nn.Module:
    """What a user of PEFT gets: the model loaded whole and decomposed in the training script."""
    config = peft.LoraConfig(
        # PEFT keeps "all-linear" off a head only for SEQ_CLS; for other heads it would fail.
        exclude_modules=HEADS.get(task_type),
        r=RANK,
        lora_alpha=2 * RANK,
        init_lora_weights="pissa",
        task_type=task_type,
        **{"target_modules": "all-linear", **targets},
    )
    return peft.get_peft_model(load_original(folder), config)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    weights = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        weights.update(load_file(shard))
    return weights


def keeps_float32(name: str, dtype: str, module: str) -> bool:
    # transformers loads T5's wo in float32 even from a float16 checkpoint, so PEFT decomposes
    # and stores it in float32; what is on disk is float16.
    return name == "t5" and dtype == "fp16" and module.endswith(".wo")


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize(("name", "dtype", "shards"), CASES)
def test_bit_for_bit(tmp_path, name, dtype, shards):
    model = tinymodels.save_model(name, tmp_path / "model", dtype=dtype, max_shard_size=shards)
    targets = what_to_convert(name)
    config = {
        **targets,
        "rank": RANK,
        "lora_alpha": 2 * RANK,
        "svd": {"method": "exact"},
        "rounding": "peft",
    }
    manifest = convert_to(model, tmp_path / "out", config)
    adapter_config = json.loads((tmp_path / "out/pissa_init/adapter_config.json").read_text())
    ours = load_file(tmp_path / "out/pissa_init/adapter_model.safetensors")
    targets.pop("task_type", None)
    theirs = peft_pissa(model, targets, adapter_config["task_type"])
    expected = peft.get_peft_model_state_dict(theirs)
    layers = {
        layer_name.removeprefix("base_model.model."): layer
        for layer_name, layer in theirs.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }

    assert ours.keys() == expected.keys()
    assert {row["module"] for row in manifest["matrices"]} == layers.keys()
    residual = weights_of(tmp_path / "out")
    for row in manifest["matrices"]:
        layer = layers[row["module"]]
        assert (row["rank"], row["scaling"]) == (layer.r["default"], layer.scaling["default"])
        if keeps_float32(name, dtype, row["module"]):
            continue
        prefix = f"base_model.model.{row['module']}"
        for factor in ("lora_A", "lora_B"):
            key = f"{prefix}.{factor}.weight"
            assert torch.equal(ours[key], expected[key]), key
        assert torch.equal(residual[row["tensor"]], layer.base_layer.weight), row["tensor"]
