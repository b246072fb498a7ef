"""What cannot be converted correctly is refused by name, with its code and reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft.tuners.lora import LoraModel
from tinymodels import edit_config, edit_tensors, save_model

from pissa_core.adapters.local import LocalSource
from pissa_core.errors import (
    InvalidConfig,
    NothingMatched,
    PissaError,
    UnsupportedArchitecture,
    UnsupportedModule,
)
from pissa_core.layout import read_layout
from pissa_core.plan import Refusal
from pissa_core.spec import parse_config
from pissa_core.targets import Targets, resolve_targets


def resolve(folder: Path, **config: Any) -> Targets:
    return resolve_targets(read_layout(LocalSource(folder)), parse_config({"rank": 3, **config}))


def save(folder: Path, model_class: str, config_class: str, **config: Any) -> Path:
    torch.manual_seed(0)
    values = getattr(transformers, config_class)(**config)
    getattr(transformers, model_class)(values).save_pretrained(folder)
    return folder


def only(targets: Targets) -> Refusal:
    assert len(targets.refused) == 1
    return targets.refused[0]


def names(targets: Targets) -> list[str]:
    return [refusal.name for refusal in targets.refused]


def codes(targets: Targets) -> set[str]:
    return {refusal.code for refusal in targets.refused}


def test_a_rank_larger_than_the_smaller_side_is_refused_with_all_numbers(tmp_path: Path) -> None:
    save_model("llama", tmp_path)

    targets = resolve(tmp_path, target_modules=["k_proj", "q_proj"], rank=17)

    assert names(targets) == [f"model.layers.{i}.self_attn.k_proj" for i in range(2)]
    assert targets.refused[0].code == "rank_too_large"
    assert targets.refused[0].reason == (
        "rank 17 exceeds 16, the highest that model.layers.0.self_attn.k_proj.weight of shape "
        "[16, 32] can have; exclude it, or give it a smaller one in rank_pattern"
    )
    # The rest is still planned, so that all objections show at once.
    assert [m.module for m in targets.matrices] == [
        f"model.layers.{i}.self_attn.q_proj" for i in range(2)
    ]


def test_the_largest_possible_rank_is_taken(tmp_path: Path) -> None:
    save_model("llama", tmp_path)

    targets = resolve(tmp_path, target_modules=["k_proj"], rank=16)

    assert targets.refused == ()
    assert {matrix.rank for matrix in targets.matrices} == {16}


@pytest.mark.parametrize("name", ["gemma", "t5"])
def test_a_tied_head_is_refused(name: str, tmp_path: Path) -> None:
    save_model(name, tmp_path)

    refusal = only(resolve(tmp_path, target_modules=["lm_head"]))

    shared = {"gemma": "model.embed_tokens.weight", "t5": "shared.weight"}[name]
    assert (refusal.name, refusal.code) == ("lm_head", "tied_weight")
    assert f"shared with {shared}" in refusal.reason


def test_an_untied_head_is_a_target_like_any_other(tmp_path: Path) -> None:
    save_model("llama", tmp_path)

    targets = resolve(tmp_path, target_modules=["lm_head"])

    assert targets.refused == ()
    assert [matrix.tensor for matrix in targets.matrices] == ["lm_head.weight"]


def test_embeddings_are_refused(tmp_path: Path) -> None:
    save_model("llama", tmp_path)

    refusal = only(resolve(tmp_path, target_modules=["embed_tokens"]))

    assert (refusal.name, refusal.code) == ("model.embed_tokens", "unsupported_module")
    assert "Embedding" in refusal.reason


def test_what_peft_itself_refuses_is_named_beside_what_it_takes(tmp_path: Path) -> None:
    save_model("llama", tmp_path)

    targets = resolve(tmp_path, target_modules=["q_proj", "input_layernorm", "mlp"])

    assert names(targets) == [
        f"model.layers.{i}.{leaf}" for i in range(2) for leaf in ("mlp", "input_layernorm")
    ]
    assert codes(targets) == {"unsupported_module"}
    assert targets.refused[0].reason == "it is a LlamaMLP; only Linear and Conv1D can be decomposed"
    assert len(targets.matrices) == 2


class TookTooLong(PissaError):
    """Comes from a signal, and so at any point."""

    code = "took_too_long"


@pytest.mark.parametrize("where", ["_create_and_replace", "inject_adapter"])
@pytest.mark.parametrize("bound", [MemoryError, TookTooLong])
def test_a_bound_that_is_met_while_refusals_are_recorded_is_no_refusal(
    bound: type[Exception], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model("llama", tmp_path)
    real = getattr(LoraModel, where)

    def meet(self: LoraModel, *args: Any, **kw: Any) -> Any:
        if type(self) is LoraModel:
            return real(self, *args, **kw)
        raise bound("met")

    monkeypatch.setattr(LoraModel, where, meet)
    with pytest.raises(bound, match="met"):
        resolve(tmp_path, target_modules=["q_proj", "input_layernorm"])


def test_nothing_but_refused_modules_is_no_crash(tmp_path: Path) -> None:
    save_model("llama", tmp_path)

    targets = resolve(tmp_path, target_modules=r".*norm", exclude_modules=r".*\.1\..*")

    assert names(targets) == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
        "model.norm",
    ]
    assert targets.matrices == ()


VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
       "num_attention_heads": 4, "image_size": 16, "patch_size": 8}  # fmt: skip
TEXT = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip


def test_convolutions_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "ViTModel", "ViTConfig", **VIT)

    refusal = only(resolve(tmp_path, target_modules=["projection"]))

    assert refusal.code == "unsupported_module"
    assert refusal.name == "embeddings.patch_embeddings.projection"
    assert "Conv2d" in refusal.reason


@pytest.mark.parametrize("asked", ["attention", "out_proj"])
def test_multihead_attention_is_refused_whole_and_in_part(asked: str, tmp_path: Path) -> None:
    text = {**TEXT, "projection_size": 32, "bos_token_id": 1, "eos_token_id": 2}
    save(tmp_path, "SiglipModel", "SiglipConfig", vision_config=VIT, text_config=text)

    targets = resolve(tmp_path, target_modules=rf"vision_model\.head\..*{asked}")

    assert codes(targets) == {"unsupported_module"}
    assert all("MultiheadAttention" in refusal.reason for refusal in targets.refused)
    assert targets.matrices == ()


def test_fused_experts_and_their_router_are_refused(tmp_path: Path) -> None:
    save_model("mixtral", tmp_path)

    targets = resolve(tmp_path)

    assert set(names(targets)) == {
        f"model.layers.{i}.mlp.{leaf}"
        for i in range(2)
        for leaf in ("experts.gate_up_proj", "experts.down_proj", "gate")
    }
    assert codes(targets) == {"unsupported_module"}
    assert any("[3, 96, 32] of MixtralExperts" in refusal.reason for refusal in targets.refused)
    assert len(targets.matrices) == 8


def test_half_of_a_fused_expert_is_refused_by_one_sentence(tmp_path: Path) -> None:
    save_model("mixtral", tmp_path)

    with pytest.raises(UnsupportedModule, match="w1 without also targeting w3") as info:
        resolve(tmp_path, target_modules=["w1"])
    assert info.value.message.startswith("PEFT cannot adapt these targets in MixtralForCausalLM")


def test_mamba_projections_that_its_kernels_use_bare_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "MambaForCausalLM", "MambaConfig", vocab_size=96, hidden_size=32,
         num_hidden_layers=1, state_size=4)  # fmt: skip

    targets = resolve(tmp_path, rank=2)

    mixer = "backbone.layers.0.mixer"
    assert set(names(targets)) == {f"{mixer}.{leaf}" for leaf in ("out_proj", "x_proj", "dt_proj")}
    assert [matrix.module for matrix in targets.matrices] == [f"{mixer}.in_proj"]
    reasons = {refusal.name: refusal.reason for refusal in targets.refused}
    assert "incompatible with Mamba" in reasons[f"{mixer}.out_proj"]
    assert "MambaMixer multiplies by its bare weight" in reasons[f"{mixer}.x_proj"]


def test_a_linear_that_does_more_than_multiply_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "Llama4ForCausalLM", "Llama4TextConfig", num_local_experts=3, head_dim=8,
         num_key_value_heads=2, intermediate_size_mlp=48, pad_token_id=0, **TEXT)  # fmt: skip

    refusal = only(resolve(tmp_path, target_modules=["router", "q_proj"]))

    assert (refusal.name, refusal.code) == (
        "model.layers.0.feed_forward.router",
        "unsupported_module",
    )
    assert "Llama4Router" in refusal.reason


@pytest.mark.parametrize(
    ("dtype", "spelling"), [(torch.float64, "F64"), (torch.float8_e4m3fn, "F8_E4M3")]
)
def test_other_dtypes_are_refused_where_they_are_targets(
    dtype: torch.dtype, spelling: str, tmp_path: Path
) -> None:
    save_model("llama", tmp_path)
    key = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(tmp_path, lambda tensors: {**tensors, key: tensors[key].to(dtype)})

    refusal = only(resolve(tmp_path))

    assert (refusal.name, refusal.code) == ("model.layers.1.mlp.up_proj", "unsupported_dtype")
    assert refusal.reason == f"{key} is {spelling}; PiSSA takes F32, F16, BF16"
    assert resolve(tmp_path, exclude_modules=["up_proj"]).refused == ()


def test_a_target_without_a_tensor_is_refused(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    key = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if k != key})

    refusal = only(resolve(tmp_path))

    assert (refusal.name, refusal.code) == ("model.layers.0.mlp.up_proj", "ambiguous_name")
    assert refusal.reason.startswith(f"the checkpoint has no tensor for {key}, which is made anew")


def test_two_tensors_for_one_target_are_refused(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    key = "model.layers.0.mlp.up_proj.weight"
    twin = key.removeprefix("model.")
    edit_tensors(tmp_path, lambda tensors: {**tensors, twin: tensors[key].clone()})

    refusal = only(resolve(tmp_path))

    assert refusal.code == "ambiguous_name"
    assert refusal.reason == f"the tensors {twin} and {key} both go into {key}"


def test_a_tensor_of_another_shape_than_config_json_asks_for_is_refused(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    edit_config(tmp_path, intermediate_size=40)

    targets = resolve(tmp_path, target_modules=["up_proj"])

    assert codes(targets) == {"unsupported_architecture"}
    assert "[48, 32], config.json asks for [40, 32]" in targets.refused[0].reason


def test_a_weight_that_transformers_cuts_out_of_another_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "Dinov2Model", "Dinov2Config", use_swiglu_ffn=True, **VIT)
    stored = set(read_layout(LocalSource(tmp_path)).tensors)
    assert "encoder.layer.0.mlp.weights_in.weight" in stored

    targets = resolve(tmp_path, target_modules=["gate_proj", "up_proj", "down_proj"])

    assert {name.rpartition(".")[2] for name in names(targets)} == {"gate_proj", "up_proj"}
    assert codes(targets) == {"unsupported_module"}
    assert "encoder.layer.0.mlp.weights_in.weight on loading" in targets.refused[0].reason
    assert [matrix.tensor for matrix in targets.matrices] == [
        "encoder.layer.0.mlp.weights_out.weight"
    ]


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ({"target_modules": "q_proj"}, 'write ["q_proj"]'),
        ({"target_modules": ["q_prj"]}, "similar names in this model: q_proj"),
        ({"target_modules": ["c_attn"]}, "linear modules end in down_proj, gate_proj, k_proj"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, "layers_to_transform"),
        ({"exclude_modules": ".*"}, "exclude_modules"),
        ({"target_modules": r".*\.99\..*"}, "linear modules end in"),
    ],
)
def test_nothing_matched_repeats_the_patterns_and_says_what_to_try(
    config: dict[str, Any], hint: str, tmp_path: Path
) -> None:
    save_model("llama", tmp_path)

    with pytest.raises(NothingMatched, match="no module of the model is a target") as info:
        resolve(tmp_path, **config)

    for field, value in config.items():
        assert f"{field}={value!r}" in info.value.message
    assert hint in info.value.hint


def test_a_pattern_that_only_peft_completes_may_be_wrong(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    config = {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "("}

    with pytest.raises(InvalidConfig, match="not a regular expression"):
        resolve(tmp_path, **config)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("llama", "SEQ_CLS"),
        ("llama", "SEQ_2_SEQ_LM"),
        ("llama", "FEATURE_EXTRACTION"),
        ("roberta", "CAUSAL_LM"),
        ("roberta-cls", "TOKEN_CLS"),
        ("deberta", "QUESTION_ANS"),
    ],
)
def test_a_task_that_the_class_contradicts_is_refused(name: str, task: str, tmp_path: Path) -> None:
    save_model(name, tmp_path)
    named = json.loads((tmp_path / "config.json").read_text())["architectures"][0]

    refusal = resolve(tmp_path, task_type=task).refused[0]

    assert (refusal.name, refusal.code) == ("task_type", "invalid_config")
    assert f"task_type '{task}' does not fit the model's class {named}" in refusal.reason


def test_a_head_that_the_checkpoint_lacks_is_refused(tmp_path: Path) -> None:
    save_model("roberta", tmp_path)
    edit_config(tmp_path, architectures=["RobertaForSequenceClassification"])

    targets = resolve(tmp_path, task_type="SEQ_CLS")

    assert set(names(targets)) == {
        f"classifier.{part}.{leaf}" for part in ("dense", "out_proj") for leaf in ("weight", "bias")
    }
    assert codes(targets) == {"ambiguous_name"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": "wide"}, "config.json is no config of llama"),
        ({"vocab_size": -1}, "LlamaForCausalLM cannot be built from config.json"),
        (
            {"num_hidden_layers": 10**9},
            "num_hidden_layers = 1000000000, the checkpoint has only 21",
        ),
        ({"text_config": {"num_layers": 10**9}}, "num_layers = 1000000000"),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel cannot be built"),
    ],
)
def test_a_config_that_builds_no_model_is_an_error_of_ours(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_model("llama", tmp_path)
    edit_config(tmp_path, **config)

    with pytest.raises(UnsupportedArchitecture, match=message):
        resolve(tmp_path)
