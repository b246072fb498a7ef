"""Pairs of tiny models, and adapters trained from them, as stock PEFT does it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import tinymodels
import torch
import transformers
from conversions import convert_to
from safetensors.torch import load_file


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    weights = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        weights.update(load_file(shard))
    return weights


def load(folder: Path) -> torch.nn.Module:
    config = json.loads((folder / "config.json").read_text())
    return getattr(transformers, config["architectures"][0]).from_pretrained(folder)


def pair(name: str, folder: Path, *, dtype: str = "fp32", **config: object) -> tuple[Path, Path]:
    """Convert a tiny model; return the original and the output."""
    model = tinymodels.save_model(
        name, folder / "model", dtype=dtype, max_shard_size=tinymodels.SHARDED
    )
    convert_to(model, folder / "pair", {"rank": 4, **tinymodels.task_of(name), **config})
    return model, folder / "pair"


def trained(pair: Path, folder: Path, **changes: object) -> Path:
    """Load the pair with stock PEFT, move every trainable parameter as training would, save."""
    base = load(pair)
    initial = peft.PeftModel.from_pretrained(
        base, pair, subfolder="pissa_init", is_trainable=True, **changes
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in initial.parameters():
            if parameter.requires_grad:
                step = torch.randn(parameter.shape, generator=generator)
                parameter.add_((0.05 * step).to(parameter.dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT: what it saves beside the adapter
        initial.save_pretrained(folder)
    return folder


def retrained(output: Path, folder: Path, **config: object) -> Path:
    """Train more than the initial adapter holds: the same LoRA, with what `config` adds to it."""
    saved = peft.LoraConfig.from_pretrained(output / "pissa_init")
    values = {
        name: getattr(saved, name)
        for name in ("r", "lora_alpha", "target_modules", "base_model_name_or_path", "task_type")
    }
    model = load(output)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**{**values, **config}))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        wrapped.peft_config["default"].base_model_name_or_path = str(output)
        wrapped.save_pretrained(folder)
    return folder
