"""An adapter folded back into its residual: PEFT's own merge as the oracle, and the original."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import tinymodels
import torch
from conversions import checksums, convert_to, fold_to, folding_of
from fold_tools import load, pair, retrained, trained, weights_of
from safetensors.torch import load_file, save_file

from pissa_core.events import MatrixDone

EPS = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}
ARCHITECTURES = ("llama", "gpt2-bare", "roberta", "t5", "roberta-cls")
LORA = ".lora_"


def merged_by_peft(pair: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = peft.PeftModel.from_pretrained(load(pair), adapter).merge_and_unload()
    return model.state_dict()


def compare_with_peft(ours: Path, pair: Path, adapter: Path, eps: float) -> None:
    """Every parameter is PEFT's, to the rounding of the weights and of a float32 product."""
    theirs = merged_by_peft(pair, adapter)
    mine = load(ours).state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        slack = 2 * eps * value.float().abs() + 2.0**-20
        apart = (mine[name].float() - value.float()).abs()
        assert bool((apart <= slack).all()), (name, float(apart.max()))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_trained_adapter_gives_pefts_merge(tmp_path, name, dtype):
    _, output = pair(name, tmp_path, dtype=dtype)
    adapter = trained(output, tmp_path / "trained")
    manifest = fold_to(output, adapter, tmp_path / "plain")
    compare_with_peft(tmp_path / "plain", output, adapter, EPS[dtype])
    assert manifest["adapter"]["initial"] is False
    assert manifest["original"] is None
    assert manifest["totals"]["equal_weights"] is None
    assert manifest["totals"]["max_update"] > 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_initial_adapter_gives_the_original_back(tmp_path, name, dtype):
    """Entry by entry within u |R| + u |W| and the float32 accumulation of r products."""
    model, output = pair(name, tmp_path, dtype=dtype)
    manifest = fold_to(output, output / "pissa_init", tmp_path / "plain")
    original, residual, back = map(weights_of, (model, output, tmp_path / "plain"))
    factors = load_file(output / "pissa_init/adapter_model.safetensors")
    rows = {row["tensor"]: row for row in manifest["matrices"]}
    assert original.keys() == back.keys()
    equal = weights = 0
    for key, wanted in original.items():
        if key not in rows:
            assert torch.equal(back[key], wanted), key
            continue
        row = rows[key]
        same = int((back[key] == wanted).sum())
        assert row["equal_weights"] == same
        assert row["weights"] == wanted.numel()
        equal, weights = equal + same, weights + wanted.numel()
        stem = f"base_model.model.{row['module']}"
        a, b = factors[f"{stem}.lora_A.weight"], factors[f"{stem}.lora_B.weight"]
        sizes = (b.abs() @ a.abs()) * row["scaling"]
        sizes = sizes if sizes.shape == wanted.shape else sizes.t()
        u, tiny = EPS[dtype], 2.0**-25 if dtype == "fp16" else 0.0
        W, R = wanted.float().abs(), residual[key].float().abs()
        accumulation = 2.0**-23 * (row["rank"] + 4) * (sizes + W)
        bound = u * R + u * (W + u * R) + accumulation + 2 * tiny
        assert bool(((back[key].float() - wanted.float()).abs() <= bound).all()), key
    totals = manifest["totals"]
    assert (totals["equal_weights"], totals["weights"]) == (equal, weights)
    assert equal > weights / 2
    assert totals["max_ulps"] == max(row["max_ulps"] for row in rows.values()) > 0
    assert manifest["original"]["ref"] == str(model)


CONFIGS = {
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        "alpha_pattern": {"v_proj": 1, "q_proj": 8},
    },
    "bf16 factors": {"adapter_dtype": "bfloat16"},
    "as peft rounds": {"svd": {"method": "exact"}, "rounding": "peft"},
}


@pytest.mark.parametrize("config", CONFIGS)
def test_scalings_are_pefts(tmp_path, config):
    model, output = pair("llama", tmp_path, **CONFIGS[config])
    adapter = trained(output, tmp_path / "trained")
    fold_to(output, adapter, tmp_path / "plain")
    compare_with_peft(tmp_path / "plain", output, adapter, EPS["fp32"])
    fold_to(output, output / "pissa_init", tmp_path / "back")
    wanted, found = weights_of(model), weights_of(tmp_path / "back")
    # Factors in bfloat16 go into the residual as they are stored, so nothing is lost by them.
    assert all(torch.allclose(found[key], wanted[key], atol=1e-6, rtol=1e-5) for key in wanted)


WHOLE = {
    "bias lora_only": ("gpt2", {"bias": "lora_only"}),
    "bias all": ("gpt2", {"bias": "all"}),
    "biases of an encoder": ("roberta", {"bias": "all"}),
    "saved norm": ("llama", {"modules_to_save": ["norm"]}),
    "saved head": ("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "both": ("gpt2", {"bias": "all", "modules_to_save": ["ln_f"]}),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")
@pytest.mark.parametrize("case", WHOLE)
def test_what_is_trained_whole_goes_in_as_well(tmp_path, case):
    name, config = WHOLE[case]
    _, output = pair(name, tmp_path)
    adapter = retrained(output, tmp_path / "trained", **config)
    manifest = fold_to(output, adapter, tmp_path / "plain")
    assert manifest["replaced"]
    assert manifest["totals"]["replaced"] == len(manifest["replaced"])
    compare_with_peft(tmp_path / "plain", output, adapter, EPS["fp32"])


def test_an_adapter_saved_in_half_precision_is_widened_first(tmp_path):
    _, output = pair("llama", tmp_path)
    adapter = trained(output, tmp_path / "trained")
    path = adapter / "adapter_model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(path).items()}, path, {"format": "pt"})
    fold_to(output, adapter, tmp_path / "plain")
    compare_with_peft(tmp_path / "plain", output, adapter, EPS["fp32"])


def test_embedding_factors_go_in_turned(tmp_path):
    model = tinymodels.save_model("llama", tmp_path / "model")
    wrapped = peft.get_peft_model(
        load(model),
        peft.LoraConfig(r=3, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False),
    )
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    fold_to(model, tmp_path / "adapter", tmp_path / "plain")
    compare_with_peft(tmp_path / "plain", model, tmp_path / "adapter", EPS["fp32"])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_head_that_peft_saved_beside_its_factors(tmp_path, dtype):
    """PEFT by itself saves the weight of a target that is a head or an embedding."""
    _, output = pair("llama", tmp_path, dtype=dtype, target_modules=["q_proj", "lm_head"])
    adapter = trained(output, tmp_path / "trained")
    path = adapter / "adapter_model.safetensors"
    saved = load_file(path)
    key = "base_model.model.lm_head.base_layer.weight"
    save_file({**saved, key: saved[key].float()}, path, {"format": "pt"})
    manifest = fold_to(output, adapter, tmp_path / "plain")
    assert manifest["replaced"] == []
    compare_with_peft(tmp_path / "plain", output, adapter, EPS[dtype])


def test_only_the_plain_model_comes_out_with_its_own_card(tmp_path):
    model = tinymodels.save_model("llama", tmp_path / "model")
    (model / "tokenizer.json").write_text('{"left": "as it was"}')
    (model / "README.md").write_text("---\nlicense: mit\ntags: [poetry]\n---\n# The first card\n")
    convert_to(model, tmp_path / "pair", {"rank": 4})
    fold_to(tmp_path / "pair", tmp_path / "pair/pissa_init", tmp_path / "plain")
    found = {path.name for path in (tmp_path / "plain").iterdir()}
    wanted = {path.name for path in model.iterdir()} | {"pissa_manifest.json"}
    assert found == wanted
    for name in wanted - {"README.md", "pissa_manifest.json", "model.safetensors"}:
        assert (tmp_path / "plain" / name).read_bytes() == (model / name).read_bytes()
    card = (tmp_path / "plain/README.md").read_text()
    assert "license: mit" in card
    assert "poetry" in card
    assert card.endswith("# The first card\n")
    assert card.count("# The card of the original model") == 1
    assert "The residual model" not in card
    assert "- residual" not in card
    assert str(tmp_path) not in card


def test_the_manifest_tells_every_other_files_checksum(tmp_path):
    _, output = pair("llama", tmp_path)
    manifest = fold_to(output, output / "pissa_init", tmp_path / "plain")
    found = checksums(tmp_path / "plain")
    assert json.loads((tmp_path / "plain/pissa_manifest.json").read_text()) == manifest
    del found["pissa_manifest.json"]
    assert {path: info["sha256"] for path, info in manifest["files"].items()} == found
    assert manifest["kind"] == "pissa-to-base"


def test_an_original_out_of_reach_is_not_told_of(tmp_path):
    model, output = pair("llama", tmp_path)
    model.rename(tmp_path / "elsewhere")
    manifest = fold_to(output, output / "pissa_init", tmp_path / "plain")
    assert manifest["adapter"]["initial"] is True
    assert manifest["original"] is None
    assert manifest["totals"]["max_ulps"] is None


@pytest.mark.parametrize("stop_after", [1, 3, 6, 12])
def test_stopped_anywhere_and_run_again_gives_the_same_bytes(tmp_path, stop_after):
    _, output = pair("gpt2", tmp_path)
    adapter = retrained(output, tmp_path / "trained", bias="all", fan_in_fan_out=True)
    fold_to(output, adapter, tmp_path / "plain")
    undisturbed = checksums(tmp_path / "plain")
    (tmp_path / "plain").rename(tmp_path / "undisturbed")
    course = folding_of(output, adapter, tmp_path / "plain", slots=1)
    seen = [next(course) for _ in range(stop_after)]
    course.close()
    assert not (tmp_path / "plain").exists()
    done = {event.row["tensor"] for event in seen if isinstance(event, MatrixDone)}
    again = list(folding_of(output, adapter, tmp_path / "plain", slots=2))
    fresh = {e.row["tensor"] for e in again if isinstance(e, MatrixDone) and not e.resumed}
    assert not fresh & done
    assert checksums(tmp_path / "plain") == undisturbed
    assert not list(tmp_path.glob(".plain*"))


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")
def test_a_damaged_tensor_that_was_replaced_is_noticed(tmp_path):
    _, output = pair("llama", tmp_path)
    adapter = retrained(output, tmp_path / "trained", modules_to_save=["norm"])
    manifest = fold_to(output, adapter, tmp_path / "plain")
    undisturbed = checksums(tmp_path / "plain")
    (tmp_path / "plain").rename(tmp_path / "undisturbed")
    course = folding_of(output, adapter, tmp_path / "plain", slots=1)
    next(event for event in course if isinstance(event, MatrixDone))
    course.close()
    replaced, damaged = set(manifest["replaced"]), 0
    for shard in tmp_path.glob(".plain.pissa-staging-*/work/*/*/shard"):
        content = bytearray(shard.read_bytes())
        length = 8 + int.from_bytes(content[:8], "little")
        table = json.loads(content[8:length])
        for name in replaced & table.keys():
            content[length + table[name]["data_offsets"][0]] ^= 1
            damaged += 1
        shard.write_bytes(content)
    assert damaged
    fold_to(output, adapter, tmp_path / "plain")
    assert checksums(tmp_path / "plain") == undisturbed
