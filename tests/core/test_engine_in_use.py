"""The published pair in the hands of stock transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tinymodels
import torch
import transformers
from conversions import convert_to
from peft import PeftModel

from app.minilm import fetch_minilm

# One rounding of a bfloat16 or float16 weight is at most this share of it.
UNIT = {"bf16": 2.0**-8, "fp16": 2.0**-11}


def inputs_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        ids = torch.randint(3, 90, (2, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return inputs


def outputs_of(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**inputs_of(model))[0].double()


def load_base(folder: Path, auto: str | None = None) -> torch.nn.Module:
    config = json.loads((folder / "config.json").read_text())
    name = auto or config["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder)


def load_pair(folder: Path, auto: str | None = None) -> PeftModel:
    base = load_base(folder, auto)
    return PeftModel.from_pretrained(base, folder, subfolder="pissa_init", is_trainable=True)


def relative_difference(new: torch.Tensor, old: torch.Tensor) -> float:
    return float((new - old).norm() / old.norm())


def asked(name: str, **more) -> dict:
    config = {"rank": 3, "lora_alpha": 5, **tinymodels.task_of(name), **more}
    if name == "mixtral":
        config["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return config


@pytest.mark.parametrize("name", tinymodels.MODELS)
@pytest.mark.parametrize("shards", [None, tinymodels.SHARDED])
def test_float32_pairs_give_the_originals_outputs(tmp_path, name, shards):
    model = tinymodels.save_model(name, tmp_path / "model", max_shard_size=shards)
    convert_to(model, tmp_path / "out", asked(name))
    original = outputs_of(load_base(model))
    assert relative_difference(outputs_of(load_pair(tmp_path / "out")), original) < 1e-5
    assert relative_difference(outputs_of(load_base(tmp_path / "out")), original) > 1e-2


def move_by_one_rounding(model: torch.nn.Module, unit: float) -> torch.nn.Module:
    """Move every entry of every matrix up or down by what one rounding may change."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(2)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                sign = torch.randint(0, 2, parameter.shape) * 2 - 1
                parameter.mul_(1 + sign * unit)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta", "t5"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_pairs_are_off_by_no_more_than_a_rounding_explains(tmp_path, name, dtype):
    model = tinymodels.save_model(name, tmp_path / "model", dtype=dtype)
    convert_to(model, tmp_path / "out", asked(name))
    # In float32 arithmetic, so that what differs is the weights' rounding alone.
    original = load_base(model).float()
    pair = load_pair(tmp_path / "out").float()
    moved = move_by_one_rounding(load_base(model).float(), UNIT[dtype])
    explained = relative_difference(outputs_of(moved), outputs_of(original))
    assert relative_difference(outputs_of(pair), outputs_of(original)) < explained


@pytest.mark.parametrize("name", ["roberta-cls", "deberta-cls"])
def test_sequence_classifiers_load_by_their_task(tmp_path, name):
    model = tinymodels.save_model(name, tmp_path / "model")
    convert_to(model, tmp_path / "out", asked(name, task_type="SEQ_CLS"))
    auto = "AutoModelForSequenceClassification"
    pair = load_pair(tmp_path / "out", auto)
    assert type(pair).__name__ == "PeftModelForSequenceClassification"
    original = outputs_of(load_base(model, auto))
    assert relative_difference(outputs_of(pair), original) < 1e-5


def train(model: PeftModel, steps: int = 6) -> list[float]:
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    inputs = inputs_of(model)
    losses = []
    for _ in range(steps):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_the_pair_trains_and_is_saved_and_loaded_again(tmp_path, name):
    model = tinymodels.save_model(name, tmp_path / "model")
    convert_to(model, tmp_path / "out", asked(name))
    pair = load_pair(tmp_path / "out")
    losses = train(pair)
    assert losses[-1] < losses[0]
    trained = outputs_of(pair)
    pair.save_pretrained(tmp_path / "trained")
    base = load_base(tmp_path / "out")
    again = PeftModel.from_pretrained(base, tmp_path / "trained")
    assert relative_difference(outputs_of(again), trained) < 1e-6


def test_the_real_minilm(tmp_path):
    model = fetch_minilm()
    manifest = convert_to(model, tmp_path / "out", {"rank": 8})
    original, residual = load_base(model), load_base(tmp_path / "out")
    pair = load_pair(tmp_path / "out")
    assert len(manifest["matrices"]) == 37
    assert relative_difference(outputs_of(pair), outputs_of(original)) < 1e-5
    assert relative_difference(outputs_of(residual), outputs_of(original)) > 1e-2
