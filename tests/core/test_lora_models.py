"""Models trained on a pair by stock PEFT: converted, they are the same model on the original."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lora_tools
import peft
import pytest
import tinymodels
import torch
import transformers
from conversions import convert_to
from lora_tools import to_lora, train, weights
from torch import Tensor

from app.minilm import fetch_minilm

RANK = 4
LOADERS = {
    "llama": transformers.LlamaForCausalLM,
    "gpt2": transformers.GPT2LMHeadModel,
    "minilm": transformers.AutoModel,
    "roberta-cls": transformers.RobertaForSequenceClassification,
}
PATTERNS: dict[str, dict[str, Any]] = {
    "llama": {
        "rank_pattern": {"q_proj": 6},
        "alpha_pattern": {"v_proj": 3.0, "layers.0.mlp.down_proj": 16, "down_proj": 5},
    },
    "gpt2": {"rank_pattern": {"c_attn": 6}, "alpha_pattern": {"h.0.mlp.c_fc": 3.0, "c_fc": 5}},
    "minilm": {"rank_pattern": {"query": 6}, "alpha_pattern": {"value": 3.0}},
}
CONFIGS = ("plain", "rslora", "patterns", "rslora+patterns")
IDS = torch.arange(36).reshape(3, 12) % 90 + 3


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Make the pair of a model under a config, once each: the folders of base and pair."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def make(name: str, config: str) -> tuple[Path, Path]:
        if (name, config) not in made:
            folder = tmp_path_factory.mktemp("pair")
            base = fetch_minilm() if name == "minilm" else folder / "base"
            if name != "minilm":
                tinymodels.save_model(name, base)
            asked = {"rank": RANK, "lora_alpha": 2 * RANK, **tinymodels.task_of(name)}
            asked |= {"use_rslora": True} if "rslora" in config else {}
            asked |= PATTERNS[name] if "patterns" in config else {}
            if name == "minilm":
                asked["target_modules"] = ["query", "value"]
            convert_to(base, folder / "pair", asked)
            made[name, config] = base, folder / "pair"
        return made[name, config]

    return make


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        answer = model(input_ids=IDS)
    return answer.logits if "logits" in answer else answer.last_hidden_state


def loss(model: Any) -> Tensor:
    answer = model(input_ids=IDS)
    values = answer.logits if "logits" in answer else answer.last_hidden_state
    return (values - 1).square().mean()


def trained_on(name: str, pair: Path, folder: Path, **changed: Any) -> peft.PeftModel:
    """Train the pair with the config's fields changed as asked; save the adapter in `folder`."""
    torch.manual_seed(0)
    base = LOADERS[name].from_pretrained(pair)
    if not changed:
        model = peft.PeftModel.from_pretrained(
            base, pair, subfolder="pissa_init", is_trainable=True
        )
    else:  # PEFT loads no adapter under a config that asks for more tensors than it has
        config = peft.PeftConfig.from_pretrained(pair / "pissa_init")
        for field, value in {"inference_mode": False, **changed}.items():
            setattr(config, field, value)
        model = peft.get_peft_model(base, config)
        factors = weights(pair / "pissa_init").items()
        named = {key.replace(".weight", ".default.weight"): tensor for key, tensor in factors}
        assert not model.load_state_dict(named, strict=False).unexpected_keys
    before = outputs(model)
    train(model, loss)
    assert relative(outputs(model), before) > 1e-2, "the training did nothing"
    model.save_pretrained(folder)
    return model


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def on_original(name: str, base: Path, adapter: Path) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(LOADERS[name].from_pretrained(base), adapter).eval()


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *((name, config) for name in ("llama", "gpt2") for config in CONFIGS),
        ("minilm", "plain"),
        ("minilm", "rslora+patterns"),
    ],
)
def test_the_converted_adapter_is_the_trained_pair(name, config, pair, tmp_path):
    base, made = pair(name, config)
    wanted = outputs(trained_on(name, made, tmp_path / "trained"))
    to_lora(tmp_path / "trained", tmp_path / "lora")
    assert relative(outputs(on_original(name, base, tmp_path / "lora")), wanted) < 1e-5


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("llama", {"modules_to_save": ["norm", "lm_head"]}),
        ("llama", {"use_dora": True}),
        ("gpt2", {"bias": "lora_only"}),
        ("gpt2", {"bias": "all"}),
        ("gpt2", {"use_dora": True}),
        ("minilm", {"bias": "all", "modules_to_save": ["pooler"]}),
        ("roberta-cls", {}),
    ],
)
def test_what_else_was_trained_is_carried_over(name, changed, pair, tmp_path):
    base, made = pair(name, "plain")
    wanted = outputs(trained_on(name, made, tmp_path / "trained", **changed))
    manifest = to_lora(tmp_path / "trained", tmp_path / "lora")
    assert manifest["lineage"]["carried"]
    assert relative(outputs(on_original(name, base, tmp_path / "lora")), wanted) < 1e-5


def test_magnitudes_alone_would_not_be_dora(pair, tmp_path):
    """The test above can fail: without the magnitudes the outputs are others."""
    base, made = pair("llama", "plain")
    wanted = outputs(trained_on("llama", made, tmp_path / "trained", use_dora=True))
    to_lora(tmp_path / "trained", tmp_path / "lora")
    lora_tools.edit_config(tmp_path / "lora", use_dora=False)
    lora_tools.edit_weights(
        tmp_path / "lora",
        lambda all_: {key: t for key, t in all_.items() if "magnitude" not in key},
    )
    assert relative(outputs(on_original("llama", base, tmp_path / "lora")), wanted) > 1e-2


@pytest.mark.parametrize(
    ("name", "targets"),
    [("llama", ["q_proj", "v_proj"]), ("gpt2", ["c_attn"]), ("minilm", ["query", "value"])],
)
def test_it_lives_beside_another_adapter(name, targets, pair, tmp_path):
    base, made = pair(name, "rslora+patterns")
    wanted = outputs(trained_on(name, made, tmp_path / "trained"))
    to_lora(tmp_path / "trained", tmp_path / "lora")
    other = peft.get_peft_model(
        LOADERS[name].from_pretrained(base),
        peft.LoraConfig(
            r=3,
            target_modules=targets,
            init_lora_weights=False,
            fan_in_fan_out=name == "gpt2",
        ),
    )
    others_outputs = outputs(other.eval())
    other.save_pretrained(tmp_path / "other")
    model = on_original(name, base, tmp_path / "lora")
    model.load_adapter(tmp_path / "other", "other")
    for _ in range(2):
        model.set_adapter("default")
        assert relative(outputs(model), wanted) < 1e-5
        model.set_adapter("other")
        assert relative(outputs(model), others_outputs) < 1e-6
    with model.disable_adapter():
        assert torch.equal(outputs(model), outputs(LOADERS[name].from_pretrained(base)))


@pytest.mark.parametrize("config", ["plain", "rslora", "patterns"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_where_peft_converts_the_bits_are_peft_s(name, config, pair, tmp_path):
    _, made = pair(name, config)
    model = trained_on(name, made, tmp_path / "trained")
    # PEFT overwrites the config of the initial adapter while it converts.
    initial = shutil.copytree(made / "pissa_init", tmp_path / "pissa_init")
    model.save_pretrained(tmp_path / "peft", path_initial_model_for_weight_conversion=str(initial))
    to_lora(tmp_path / "trained", tmp_path / "ours", made / "pissa_init")
    theirs, ours = weights(tmp_path / "peft"), weights(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key].view(torch.uint8), tensor.view(torch.uint8)), key
    assert comparable(tmp_path / "ours") == comparable(tmp_path / "peft")


def comparable(folder: Path) -> dict[str, Any]:
    """The config without what names the base: PEFT goes on naming the residual."""
    config = lora_tools.config(folder)
    config["target_modules"] = sorted(config["target_modules"])
    return {
        key: value
        for key, value in config.items()
        if key not in ("base_model_name_or_path", "revision", "inference_mode")
    }


def test_a_pair_that_peft_made_with_an_embedding_and_a_head(tmp_path):
    """PEFT leaves embeddings as plain LoRA, and saves the residual of a head it takes for one."""
    base = tinymodels.save_model("llama", tmp_path / "base")
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=8,
        init_lora_weights="pissa",
        target_modules=["q_proj", "embed_tokens", "lm_head"],
    )
    model = peft.get_peft_model(LOADERS["llama"].from_pretrained(base), config)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path / "pissa_init")
    train(model, loss)
    wanted = outputs(model)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path / "trained")
    assert any("lora_embedding_A" in key for key in weights(tmp_path / "trained"))
    manifest = to_lora(tmp_path / "trained", tmp_path / "lora", tmp_path / "pissa_init")
    assert any("lm_head.base_layer" in key for key in manifest["lineage"]["left_out"])
    loaded = on_original("llama", base, tmp_path / "lora")
    assert relative(outputs(loaded), wanted) < 1e-5
    assert lora_tools.config(tmp_path / "lora")["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapters_keep_their_dtype_and_their_bits(dtype, pair, tmp_path):
    base, made = pair("llama", "plain")
    trained_on("llama", made, tmp_path / "trained")
    for folder in (tmp_path / "trained", shutil.copytree(made, tmp_path / "made") / "pissa_init"):
        lora_tools.edit_weights(folder, lambda all_: {k: t.to(dtype) for k, t in all_.items()})
    (tmp_path / "made" / "pissa_manifest.json").unlink()
    lora_tools.edit_config(tmp_path / "trained", base_model_name_or_path=str(tmp_path / "made"))
    to_lora(tmp_path / "trained", tmp_path / "lora")
    ours, theirs = weights(tmp_path / "lora"), weights(tmp_path / "trained")
    assert {tensor.dtype for tensor in ours.values()} == {dtype}
    for key, tensor in theirs.items():
        kept = ours[key][:RANK] if "lora_A" in key else ours[key][:, :RANK]
        assert torch.equal(kept, tensor)
    on_original("llama", base, tmp_path / "lora")


@pytest.mark.parametrize(
    "options",
    [{"rank": 3}, {"tolerance": 0.02}, {"tolerance": 0.02, "uniform": True}, {"uniform": True}],
)
def test_compressed_forms_are_near_in_stock_peft(options, pair, tmp_path):
    """With a trained update of full rank 2r, what is lost is what the manifest says."""
    base, made = pair("gpt2", "rslora+patterns")
    wanted = outputs(trained_on("gpt2", made, tmp_path / "trained"))
    manifest = to_lora(tmp_path / "trained", tmp_path / "lora", **options)
    got = outputs(on_original("gpt2", base, tmp_path / "lora"))
    config = lora_tools.config(tmp_path / "lora")
    assert config["use_rslora"] is False
    if options.get("uniform"):
        assert config["rank_pattern"] == config["alpha_pattern"] == {}
        assert {row["rank"] for row in manifest["matrices"]} == {config["r"]}
    lost = manifest["totals"]["max_lost"]
    assert lost <= options.get("tolerance", 1)
    # A share of energy is a square; the network's outputs move by a few times its root.
    assert relative(got, wanted) < max(5 * lost**0.5, 1e-5)
