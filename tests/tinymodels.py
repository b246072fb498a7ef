"""Tiny random models of many architectures, saved by transformers itself, for tests.

A model is made once a process and saved wherever a test needs it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHARDED = "20KB"
"""A shard size small enough that every tiny model falls into several shards."""

_DECODER: Mapping[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ENCODER: Mapping[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DEBERTA = {
    **_ENCODER,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pooler_dropout": 0.0,
    "cls_dropout": 0.0,
    "position_biased_input": False,
}
_GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
         "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
       "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 1,
       "decoder_start_token_id": 0}  # fmt: skip
_MIXTRAL = {**_DECODER, "num_local_experts": 3, "num_experts_per_tok": 2}

MODELS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    # name: (config class, model class, config)
    "llama": ("LlamaConfig", "LlamaForCausalLM", _DECODER),
    "mistral": ("MistralConfig", "MistralForCausalLM", _DECODER),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**_DECODER, "head_dim": 8}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _DECODER),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "gpt2-bare": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", _ENCODER),
    "roberta-cls": ("RobertaConfig", "RobertaForSequenceClassification", _ENCODER),
    "deberta": ("DebertaV2Config", "DebertaV2Model", _DEBERTA),
    "deberta-cls": ("DebertaV2Config", "DebertaV2ForSequenceClassification", _DEBERTA),
    "t5": ("T5Config", "T5ForConditionalGeneration", _T5),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", _MIXTRAL),
    "roberta-token": ("RobertaConfig", "RobertaForTokenClassification", _ENCODER),
    "roberta-qa": ("RobertaConfig", "RobertaForQuestionAnswering", {**_ENCODER, "num_labels": 2}),
}

HEADED: Mapping[str, str] = {"cls": "SEQ_CLS", "token": "TOKEN_CLS", "qa": "QUESTION_ANS"}
"""Ending of a model's name → PEFT's task type, where the model has a head that stays whole."""


def task_of(name: str) -> dict[str, str]:
    """Return the config that leaves the head of a model whole, or nothing for one without."""
    task = HEADED.get(name.rpartition("-")[2])
    return {"task_type": task} if task else {}


@functools.cache
def make_model(name: str) -> PreTrainedModel:
    """Return the tiny model `name` in float32, always with the same weights; do not change it."""
    config_class, model_class, values = MODELS[name]
    config = getattr(transformers, config_class)(**values)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(config)
        with torch.no_grad():
            # Larger than transformers' own 0.02, so that a lost matrix shows in the outputs.
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.15)
    return model.eval()


def save_model(
    name: str, folder: Path, *, dtype: str = "fp32", max_shard_size: str | None = None
) -> Path:
    """Save a tiny model by transformers' own `save_pretrained`, and return its folder.

    `max_shard_size` such as `SHARDED` makes several shards. ``gpt2-bare`` is saved as its bare
    base model under the head's class name, as the Hub's gpt2 is: keys without ``transformer.``.
    """
    model = _in_dtype(name, dtype)
    options = {"max_shard_size": max_shard_size} if max_shard_size else {}
    if name == "gpt2-bare":
        model.base_model.save_pretrained(folder, **options)
        edit_config(folder, architectures=["GPT2LMHeadModel"])
    else:
        model.save_pretrained(folder, **options)
    return folder


@functools.cache
def _in_dtype(name: str, dtype: str) -> PreTrainedModel:
    if dtype == "fp32":
        return make_model(name)
    fresh = make_model.__wrapped__(name)
    return fresh.to(DTYPES[dtype])


def edit_config(folder: Path, /, **values: Any) -> None:
    """Set fields of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: each for key, each in config.items() if each is not None}))


def edit_tensors(
    folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    """Rewrite the tensors of a checkpoint of one shard."""
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})
