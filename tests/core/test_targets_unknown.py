"""Classes that transformers does not know: the tree is read from the checkpoint's keys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tinymodels import edit_config, edit_tensors, save_model

from pissa_core.adapters.local import LocalSource
from pissa_core.errors import UnsupportedArchitecture
from pissa_core.layout import read_layout
from pissa_core.spec import parse_config
from pissa_core.targets import Targets, resolve_targets


def resolve(folder: Path, **config: Any) -> Targets:
    return resolve_targets(read_layout(LocalSource(folder)), parse_config({"rank": 3, **config}))


def as_custom_code(folder: Path, name: str, model_class: str, **config: Any) -> Path:
    """Save a tiny model as if its class were code of the checkpoint's own."""
    save_model(name, folder)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": f"own.{model_class}"}
    edit_config(folder, architectures=[model_class], auto_map=auto_map, **config)
    # Would make a noise if it were ever imported.
    (folder / "own.py").write_text("raise SystemExit('remote code was run')\n")
    return folder


def normal(targets: Targets) -> Targets:
    """Forget what may differ: how the names were found, and what PEFT records of the class."""
    config = {**targets.adapter_config, "auto_mapping": None}
    matrices = tuple(sorted(targets.matrices, key=lambda matrix: matrix.start))
    return replace(
        targets,
        model_class=None,
        names_from="checkpoint keys",
        matrices=matrices,
        adapter_config=config,
    )


CONFIGS: list[dict[str, Any]] = [
    {},
    {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["layers.0.mlp.down_proj"]},
    {"target_modules": r".*\.1\..*proj", "rank_pattern": {"q_proj": 2}, "lora_alpha": 6},
    {"target_modules": ["v_proj"], "layers_to_transform": 1, "use_rslora": True},
    {"target_modules": ["lm_head"]},
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: ",".join(config) or "default")
@pytest.mark.parametrize("model_type", ["llama", "own_type"])
def test_a_renamed_llama_has_the_targets_of_a_llama(
    model_type: str, config: dict[str, Any], tmp_path: Path
) -> None:
    known = resolve(save_model("llama", tmp_path / "known"), **config)
    folder = as_custom_code(
        tmp_path / "own", "llama", "OwnForCausalLM", model_type=model_type,
    )  # fmt: skip

    unknown = resolve(folder, **config)

    assert (unknown.names_from, unknown.model_class) == ("checkpoint keys", "OwnForCausalLM")
    assert normal(unknown) == normal(known)
    assert unknown.adapter_config["task_type"] == "CAUSAL_LM"


def test_a_native_class_is_taken_even_beside_custom_code(tmp_path: Path) -> None:
    folder = as_custom_code(tmp_path, "llama", "LlamaForCausalLM")

    assert resolve(folder).names_from == "transformers"


def test_biases_norms_and_embeddings_are_no_targets(tmp_path: Path) -> None:
    folder = as_custom_code(tmp_path, "deberta", "OwnModel", model_type="own")

    targets = resolve(folder, target_modules=r".*(embeddings|LayerNorm|rel_embeddings|dense).*")

    assert {refusal.name for refusal in targets.refused} >= {
        "embeddings.LayerNorm",
        "embeddings.word_embeddings",
        "encoder.rel_embeddings",
    }
    assert {refusal.code for refusal in targets.refused} == {"unsupported_module"}
    assert {matrix.module.rpartition(".")[2] for matrix in targets.matrices} == {"dense"}
    assert targets.adapter_config["task_type"] is None


@pytest.mark.parametrize(("said", "refused"), [(None, True), (True, True), (False, False)])
def test_a_head_is_free_only_if_the_config_says_so(
    said: bool | None, refused: bool, tmp_path: Path
) -> None:
    folder = as_custom_code(tmp_path, "llama", "OwnForCausalLM", tie_word_embeddings=said)

    targets = resolve(folder, target_modules=["lm_head"])

    assert [refusal.code for refusal in targets.refused] == (["tied_weight"] if refused else [])
    assert len(targets.matrices) == (0 if refused else 1)


def test_all_linear_leaves_out_the_head_and_routers(tmp_path: Path) -> None:
    folder = as_custom_code(tmp_path, "llama", "OwnForCausalLM", model_type="own")
    extra = {
        "model.layers.0.mlp.gate.weight": torch.zeros(4, 32),
        "model.layers.0.mlp.experts.0.w1.weight": torch.zeros(8, 32),
    }
    edit_tensors(folder, lambda tensors: {**tensors, **extra})

    modules = {matrix.module for matrix in resolve(folder).matrices}

    assert "model.layers.0.mlp.experts.0.w1" in modules
    assert "model.layers.0.mlp.gate" not in modules
    assert "lm_head" not in modules
    gate = resolve(folder, target_modules=["mlp.gate"]).refused[0]
    assert (gate.name, gate.code) == ("model.layers.0.mlp.gate", "unsupported_module")


@pytest.mark.parametrize(
    ("telling", "child"), [("in_proj_weight", "out_proj"), ("A_log", "dt_proj")]
)
def test_projections_that_such_modules_use_bare_are_refused(
    telling: str, child: str, tmp_path: Path
) -> None:
    folder = as_custom_code(tmp_path, "llama", "OwnForCausalLM", model_type="own")
    extra = {
        f"model.layers.0.mixer.{telling}": torch.zeros(96, 32),
        f"model.layers.0.mixer.{child}.weight": torch.zeros(32, 32),
    }
    edit_tensors(folder, lambda tensors: {**tensors, **extra})

    refusal = resolve(folder, target_modules=[child]).refused[0]

    assert (refusal.name, refusal.code) == (f"model.layers.0.mixer.{child}", "unsupported_module")
    assert "a module like model.layers.0.mixer multiplies by its bare weight" in refusal.reason


def test_a_head_over_the_vocabulary_is_known_by_its_size(tmp_path: Path) -> None:
    folder = as_custom_code(tmp_path, "llama", "OwnForCausalLM", tie_word_embeddings=False)

    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.replace("lm_head", "decoder_out"): value for name, value in tensors.items()}

    edit_tensors(folder, rename)

    assert not any(matrix.module == "decoder_out" for matrix in resolve(folder).matrices)
    assert len(resolve(folder, target_modules=["decoder_out"]).matrices) == 1


def test_transposed_storage_is_refused(tmp_path: Path) -> None:
    folder = as_custom_code(tmp_path, "gpt2", "OwnForCausalLM", model_type="own")

    said = r"c_attn.weight \[32, 96\] with a bias of 96"
    with pytest.raises(UnsupportedArchitecture, match=said):
        resolve(folder)


def test_keys_that_form_no_tree_are_refused(tmp_path: Path) -> None:
    folder = as_custom_code(tmp_path, "llama", "OwnForCausalLM", model_type="own")
    edit_tensors(folder, lambda tensors: {**tensors, "forward.weight": torch.zeros(4, 4)})

    with pytest.raises(UnsupportedArchitecture, match="form no module tree"):
        resolve(folder)


def test_a_classification_head_is_carried_here_too(tmp_path: Path) -> None:
    folder = as_custom_code(tmp_path, "deberta-cls", "OwnForSequenceClassification")

    targets = resolve(folder, task_type="SEQ_CLS")

    assert {tensor.key for tensor in targets.carried} == {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }
    assert targets.adapter_config["task_type"] == "SEQ_CLS"
    assert targets.adapter_config["modules_to_save"] == ["classifier", "score"]


@pytest.mark.parametrize(
    ("name", "model_class"),
    [
        ("llama", "LlamaForCausalLM"),
        ("deberta", "DebertaV2Model"),
        ("roberta", "RobertaForMaskedLM"),
        ("gpt2", "GPT2LMHeadModel"),
    ],
)
def test_a_config_without_architectures_gets_the_class_that_fits_its_keys(
    name: str, model_class: str, tmp_path: Path
) -> None:
    named = resolve(save_model(name, tmp_path))
    edit_config(tmp_path, architectures=None)

    unnamed = resolve(tmp_path)

    assert unnamed.model_class == model_class
    assert unnamed == named
