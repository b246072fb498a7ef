"""Targets equal what PEFT does on the real, loaded model, for every architecture and spelling."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from tinymodels import MODELS, SHARDED, edit_config, save_model

from pissa_core.adapters.local import LocalSource
from pissa_core.layout import read_layout
from pissa_core.plan import Matrix
from pissa_core.spec import parse_config
from pissa_core.targets import Targets, resolve_targets
from pissa_core.tensorfile import TORCH_DTYPES

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
HEADED = ("roberta-token", "roberta-qa")
HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}


def resolve(folder: Path, **config: Any) -> Targets:
    return resolve_targets(read_layout(LocalSource(folder)), parse_config({"rank": 3, **config}))


def load(folder: Path, name: str) -> transformers.PreTrainedModel:
    return getattr(transformers, MODELS[name][1]).from_pretrained(folder)


def by_peft(model: transformers.PreTrainedModel, **config: Any) -> PeftModel:
    """The oracle: PEFT's own injection into a model with weights."""
    rank = config.pop("rank", 3)
    alpha = config.pop("lora_alpha", rank)
    task = config.get("task_type")
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        init_lora_weights=False,
        modules_to_save=HEADS.get(task),
        **{"target_modules": "all-linear", **config},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks are not what is tested
        return get_peft_model(model, lora)


def assert_same(targets: Targets, wrapped: PeftModel) -> None:
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in wrapped.named_modules()
        if isinstance(layer, LoraLayer)
    }
    found = {m.module: (m.rank, m.scaling, m.transposed) for m in targets.matrices}
    assert found == {
        name: (layer.r["default"], layer.scaling["default"], layer.fan_in_fan_out)
        for name, layer in layers.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keys = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    shapes = {m.key_a: (m.rank, m.in_features) for m in targets.matrices}
    shapes |= {m.key_b: (m.out_features, m.rank) for m in targets.matrices}
    shapes |= {tensor.key: tensor.shape for tensor in targets.carried}
    assert shapes == {key: tuple(value.shape) for key, value in keys.items()}


def read(folder: Path, tensor: Any) -> torch.Tensor:
    with (folder / tensor.shard).open("rb") as file:
        file.seek(tensor.start)
        content = bytearray(file.read(tensor.stop - tensor.start))
    return torch.frombuffer(content, dtype=TORCH_DTYPES[tensor.dtype]).view(tensor.shape)


@pytest.mark.parametrize("shard_size", [None, SHARDED], ids=["whole", "sharded"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in HEADED])
def test_every_model_has_the_targets_and_tensors_that_peft_gives_it(
    name: str, dtype: str, shard_size: str | None, tmp_path: Path
) -> None:
    save_model(name, tmp_path, dtype=dtype, max_shard_size=shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or shard_size is None
    # Mixtral's experts are fused in transformers 5: PEFT has no PiSSA for them.
    asked = ATTENTION if name == "mixtral" else "all-linear"
    targets = resolve(tmp_path, target_modules=asked)
    model = load(tmp_path, name)
    weights = {m.module: model.get_submodule(m.module).weight.detach() for m in targets.matrices}

    assert targets.refused == ()
    assert targets.names_from == "transformers"
    assert targets.model_class == MODELS[name][1]
    for matrix in targets.matrices:
        stored = read(tmp_path, matrix)
        # transformers keeps T5's wo in float32 under float16.
        assert torch.equal(stored, weights[matrix.module].to(stored.dtype)), matrix.module
    assert_same(targets, by_peft(model, target_modules=asked))


SPELLINGS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "list": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "full path": ("llama", {"target_modules": ["model.layers.1.mlp.up_proj", "k_proj"]}),
    "regex": ("llama", {"target_modules": r".*\.1\..*(q|v)_proj"}),
    "exclude list": ("llama", {"exclude_modules": ["q_proj", "model.layers.0.mlp.up_proj"]}),
    "exclude regex": ("llama", {"exclude_modules": r".*mlp.*"}),
    "exclude nothing": ("llama", {"exclude_modules": ["c_attn"]}),
    "one layer": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1}),
    "layers": ("t5", {"target_modules": ["q", "wo"], "layers_to_transform": [1]}),
    "layers pattern": (
        "gpt2",
        {"target_modules": ["c_attn", "c_fc"], "layers_to_transform": [0], "layers_pattern": "h"},
    ),
    "layers patterns": (
        "llama",
        {
            "target_modules": ["q_proj"],
            "layers_to_transform": [1],
            "layers_pattern": ["blocks", "layers"],
        },
    ),
    "rank pattern": ("llama", {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 5}}),
    "first rank wins": (
        "llama",
        {"rank_pattern": {"q_proj": 2, r"layers.0.self_attn.q_proj": 5, "k_proj": 1}},
    ),
    "alpha pattern": ("gpt2", {"lora_alpha": 6, "alpha_pattern": {"c_proj": 12}}),
    "first alpha wins": (
        "qwen2",
        {"alpha_pattern": {r".*proj": 7, "k_proj": 9}, "rank_pattern": {"v_proj": 4}},
    ),
    "pattern of nothing": ("llama", {"rank_pattern": {"c_attn": 2}}),
    "rslora": ("llama", {"use_rslora": True, "lora_alpha": 8, "rank_pattern": {"o_proj": 2}}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn"]}),
    "tied model": ("gemma", {"target_modules": r"model\.layers\.\d+\.mlp\..*_proj"}),
    "bare base": ("gpt2-bare", {"target_modules": ["attn.c_proj"], "lora_alpha": 1}),
    "fewer heads": ("mistral", {"target_modules": ["k_proj", "v_proj"]}),
    "seq cls": ("roberta-cls", {"task_type": "SEQ_CLS"}),
    "seq cls of deberta": ("deberta-cls", {"task_type": "SEQ_CLS", "target_modules": ["dense"]}),
    "head as a target": ("roberta-cls", {"target_modules": ["query", "classifier.dense"]}),
    "token cls": ("roberta-token", {"task_type": "TOKEN_CLS"}),
    "question answering": ("roberta-qa", {"task_type": "QUESTION_ANS"}),
    "feature extraction": ("deberta", {"task_type": "FEATURE_EXTRACTION"}),
    "encoder": ("deberta", {"target_modules": ["query_proj", "value_proj"]}),
    "causal": ("llama", {"task_type": "CAUSAL_LM"}),
    "seq2seq": ("t5", {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "v"]}),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_config_means_what_it_means_to_peft(
    spelling: str, tmp_path: Path
) -> None:
    name, config = SPELLINGS[spelling]
    save_model(name, tmp_path)

    targets = resolve(tmp_path, **config)

    assert targets.refused == ()
    assert_same(targets, by_peft(load(tmp_path, name), **config))


def write_adapter(folder: Path, targets: Targets) -> dict[str, torch.Tensor]:
    """Write an adapter of random factors as the engine writes it; return its tensors."""
    generator = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {tensor.key: tensor.shape for tensor in targets.carried}
    for matrix in targets.matrices:
        shapes[matrix.key_a] = (matrix.rank, matrix.in_features)
        shapes[matrix.key_b] = (matrix.out_features, matrix.rank)
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    # Sorted throughout, as PEFT itself saves it.
    config = json.dumps(targets.adapter_config, sort_keys=True)
    (folder / "adapter_config.json").write_text(config)
    return tensors


@pytest.mark.parametrize("case", [*SPELLINGS, *MODELS])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:You have passed exclude_modules:UserWarning")
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
def test_stock_peft_loads_every_tensor_of_the_adapter(case: str, tmp_path: Path) -> None:
    asked = {"rank": 2, "target_modules": ATTENTION if case == "mixtral" else "all-linear"}
    name, config = SPELLINGS.get(case, (case, asked))
    targets = resolve(save_model(name, tmp_path / "model"), **config)
    written = write_adapter(tmp_path / "adapter", targets)

    loaded = PeftModel.from_pretrained(
        load(tmp_path / "model", name), tmp_path / "adapter", is_trainable=True
    )

    held = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert held.keys() == written.keys()
    assert all(torch.equal(held[key], value) for key, value in written.items())
    assert_same(targets, loaded)


def test_the_adapter_config_is_peft_s_but_for_what_loading_needs(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "model")
    config = {"target_modules": ["v_proj", "q_proj"], "rank_pattern": {"q_proj": 2}}
    targets = resolve(tmp_path / "model", **config)
    wrapped = by_peft(load(tmp_path / "model", "llama"), task_type="CAUSAL_LM", **config)
    wrapped.save_pretrained(tmp_path / "peft")

    saved = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())

    expected = {**saved, "init_lora_weights": True, "target_modules": ["q_proj", "v_proj"]}
    del expected["base_model_name_or_path"], expected["revision"]
    assert json.loads(json.dumps(targets.adapter_config)) == expected


def test_without_a_task_the_config_names_the_class_as_peft_does(tmp_path: Path) -> None:
    save_model("deberta", tmp_path / "model")
    targets = resolve(tmp_path / "model", target_modules=["query_proj"])
    wrapped = by_peft(load(tmp_path / "model", "deberta"), target_modules=["query_proj"])
    wrapped.save_pretrained(tmp_path / "peft")

    saved = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())

    assert targets.adapter_config["auto_mapping"] == saved["auto_mapping"]
    assert targets.adapter_config["task_type"] is None


@pytest.mark.parametrize(
    ("name", "task"),
    [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"), ("roberta", None), ("deberta", None)],
)
def test_the_task_is_inferred_for_language_models_alone(
    name: str, task: str | None, tmp_path: Path
) -> None:
    targets = resolve(save_model(name, tmp_path))

    assert targets.adapter_config["task_type"] == task


def test_a_classifier_s_head_is_carried_whole(tmp_path: Path) -> None:
    save_model("roberta-cls", tmp_path, dtype="bf16", max_shard_size=SHARDED)
    targets = resolve(tmp_path, task_type="SEQ_CLS")
    state = load(tmp_path, "roberta-cls").state_dict()

    assert {tensor.key for tensor in targets.carried} == {
        f"base_model.model.classifier.{part}.{leaf}"
        for part in ("dense", "out_proj")
        for leaf in ("weight", "bias")
    }
    for tensor in targets.carried:
        expected = state[tensor.key.removeprefix("base_model.model.")]
        assert torch.equal(read(tmp_path, tensor), expected)
    assert not any("classifier" in matrix.module for matrix in targets.matrices)


def test_patterns_whose_order_matters_are_saved_free_of_it(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    patterns = {"q_proj": 2, "layers.0.self_attn.q_proj": 5}

    targets = resolve(tmp_path, target_modules=["q_proj"], rank_pattern=patterns)

    assert targets.adapter_config["rank_pattern"] == {
        r"^model\.layers\.0\.self_attn\.q_proj": 2,
        r"^model\.layers\.1\.self_attn\.q_proj": 2,
    }


def test_the_same_question_has_the_same_answer(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    first = resolve(tmp_path)

    again = resolve(tmp_path)

    assert again == first
    assert first.adapter_config["target_modules"] == sorted(first.adapter_config["target_modules"])


def test_matrices_are_those_of_the_checkpoint_s_own_keys(tmp_path: Path) -> None:
    save_model("gpt2-bare", tmp_path)

    first: Matrix = resolve(tmp_path).matrices[0]

    assert (first.module, first.tensor) == ("transformer.h.0.attn.c_attn", "h.0.attn.c_attn.weight")
    assert (first.shape, first.out_features, first.in_features) == ((32, 96), 96, 32)


@pytest.mark.parametrize(
    ("config", "remark"),
    [
        ({"rank_pattern": {"c_attn": 2}}, "rank_pattern keys did not match any targeted module"),
        (
            {"exclude_modules": ["y", "x"]},
            "exclude_modules=['y', 'x'] excludes none of the targets",
        ),
        ({"target_modules": ["q_proj", "v_porj"]}, "'v_porj', as target_modules has it; similar "),
        ({"target_modules": ["q_proj", "zzz"]}, "no module is named 'zzz', as target_modules has"),
    ],
)
def test_a_setting_without_effect_is_noted(
    config: dict[str, Any], remark: str, tmp_path: Path
) -> None:
    targets = resolve(save_model("llama", tmp_path), **config)

    assert targets.refused == ()
    assert len(targets.notes) == 1
    assert remark in targets.notes[0]


def test_notes_are_few_and_short(tmp_path: Path) -> None:
    unknown = [f"{'x' * 5000}{i}" for i in range(3000)]
    targets = resolve(save_model("llama", tmp_path), target_modules=["q_proj", *unknown, *unknown])

    assert len(targets.notes) == 11
    assert max(map(len, targets.notes)) < 500
    assert targets.notes[-1] == "2990 more of target_modules are the names of no module"


def test_a_name_that_peft_translates_is_not_noted(tmp_path: Path) -> None:
    targets = resolve(save_model("mixtral", tmp_path), target_modules=["q_proj", "w1", "w3"])

    assert targets.notes == ()


def test_a_name_of_nothing_is_noted_where_peft_refuses_another_module(tmp_path: Path) -> None:
    targets = resolve(save_model("llama", tmp_path), target_modules=["q_proj", "mlp", "zzz"])

    assert [refusal.code for refusal in targets.refused] == ["unsupported_module"] * 2
    assert len(targets.notes) == 1
    assert "'zzz'" in targets.notes[0]


def test_a_target_that_other_settings_drop_is_not_noted(tmp_path: Path) -> None:
    targets = resolve(
        save_model("llama", tmp_path),
        target_modules=["q_proj", "k_proj"],
        exclude_modules=["k_proj"],
    )

    assert targets.notes == ()


def test_the_prefix_of_a_head_s_checkpoint_is_dropped_for_the_bare_class(tmp_path: Path) -> None:
    save_model("roberta", tmp_path)
    edit_config(tmp_path, architectures=["RobertaModel"])

    targets = resolve(tmp_path, exclude_modules=["pooler.dense"])

    assert targets.refused == ()
    assert all(m.tensor == f"roberta.{m.module}.weight" for m in targets.matrices)
    bare = transformers.RobertaModel.from_pretrained(tmp_path)
    assert_same(targets, by_peft(bare, exclude_modules=["pooler.dense"]))


def test_a_config_without_a_model_type_is_read_by_the_class_it_names(tmp_path: Path) -> None:
    known = resolve(save_model("llama", tmp_path))
    edit_config(tmp_path, model_type=None)

    assert resolve(tmp_path) == known
