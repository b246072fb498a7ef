"""Bad input, one case a line: its own code, a sentence that names it, and nothing left behind."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import tinymodels
import torch
from conversions import checksums, convert_to
from safetensors.torch import load_file, save_file

from pissa_core.adapters import open_source
from pissa_core.errors import PissaError
from pissa_core.planning import make_plan
from pissa_core.refs import parse_ref
from pissa_core.spec import parse_config

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def remove_weights(folder: Path) -> None:
    weights(folder).rename(folder / "pytorch_model.bin")


def write_index(folder: Path, weight_map: object) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def name_a_missing_shard(folder: Path) -> None:
    names = list(load_file(weights(folder)))
    weights(folder).rename(folder / "model-00001-of-00002.safetensors")
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    write_index(folder, {name: shards[i % 2] for i, name in enumerate(names)})


def point_outside(folder: Path) -> None:
    names = list(load_file(weights(folder)))
    weights(folder).rename(folder.parent / "outside.safetensors")
    write_index(folder, dict.fromkeys(names, "../outside.safetensors"))


def cut_short(folder: Path) -> None:
    content = weights(folder).read_bytes()
    weights(folder).write_bytes(content[:-1000])


def edit_header(edit: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = weights(folder).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        edit(header)
        text = json.dumps(header).encode()
        body = content[8 + length :]
        weights(folder).write_bytes(len(text).to_bytes(8, "little") + text + body)

    return damage


def shift(header: dict, by: int) -> None:
    start, stop = header[Q_PROJ]["data_offsets"]
    header[Q_PROJ]["data_offsets"] = [start + by, stop + by]


def wrong_shape(header: dict) -> None:
    header[Q_PROJ]["shape"][0] += 1


def forget(header: dict) -> None:
    del header[Q_PROJ]


def absurd_length(folder: Path) -> None:
    content = bytearray(weights(folder).read_bytes())
    content[:8] = struct.pack("<Q", 2**62)
    weights(folder).write_bytes(content)


def a_million_entries(folder: Path) -> None:
    entry = '"%06d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(entry % i for i in range(10**6)) + "}").encode()
    weights(folder).write_bytes(len(text).to_bytes(8, "little") + text)


def recast(dtype: torch.dtype) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(weights(folder))
        tensors[Q_PROJ] = tensors[Q_PROJ].to(dtype)
        save_file(tensors, weights(folder), metadata={"format": "pt"})

    return damage


def poison(value: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(weights(folder))
        tensors[Q_PROJ][3, 7] = value
        save_file(tensors, weights(folder), metadata={"format": "pt"})

    return damage


def quantise(folder: Path) -> None:
    tinymodels.edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def nothing(folder: Path) -> None:
    pass


CASES = {
    "no safetensors": ("llama", remove_weights, {}, "no_safetensors", "pytorch_model.bin"),
    "missing shard": ("llama", name_a_missing_shard, {}, "index_missing_shard", "00002-of-00002"),
    "path outside": ("llama", point_outside, {}, "unsafe_path", r"\.\./outside"),
    "cut short": ("llama", cut_short, {}, "shard_truncated", r"model\.safetensors"),
    "overlap": ("llama", edit_header(lambda h: shift(h, -64)), {}, "header_invalid", "overlap"),
    "hole": ("llama", edit_header(lambda h: shift(h, 64)), {}, "header_invalid", "q_proj|overlap"),
    "forgotten": ("llama", edit_header(forget), {}, "header_invalid", "leaves a hole"),
    "wrong size": ("llama", edit_header(wrong_shape), {}, "header_invalid", "q_proj"),
    "absurd length": ("llama", absurd_length, {}, "header_invalid", "4,?611,?686"),
    "million entries": ("llama", a_million_entries, {}, "header_invalid", "1,?000,?000|200,?000"),
    "NaN": ("llama", poison(float("nan")), {}, "non_finite_weight", r"q_proj.*\[3, 7\]"),
    "Inf": ("llama", poison(float("-inf")), {}, "non_finite_weight", r"q_proj.*\[3, 7\]"),
    "rank too large": ("llama", nothing, {"rank": 17}, "rank_too_large", r"k_proj.*17.*16"),
    "no match": ("llama", nothing, {"target_modules": ["q_prj"]}, "nothing_matched", "q_prj"),
    "tied head": ("gemma", nothing, {"target_modules": ["lm_head"]}, "tied_weight", "lm_head"),
    "embedding": (
        "llama",
        nothing,
        {"target_modules": ["embed_tokens"]},
        "unsupported_module",
        "embed_tokens.*Embedding",
    ),
    "experts": ("mixtral", nothing, {}, "unsupported_module", "experts|gate"),
    "quantised": ("llama", quantise, {}, "quantized_checkpoint", "gptq"),
    "fp64": ("llama", recast(torch.float64), {}, "unsupported_dtype", "q_proj.*F64"),
    "fp8": (
        "llama",
        recast(torch.float8_e4m3fn),
        {},
        "unsupported_dtype|quantized_checkpoint",
        "q_proj.*F8",
    ),
    "rank 0": ("llama", nothing, {"rank": 0}, "invalid_config", "rank.*got 0"),
    "rank -1": ("llama", nothing, {"rank": -1}, "invalid_config", "rank.*got -1"),
    "unknown field": ("llama", nothing, {"ranks": 4}, "invalid_config", "ranks"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_has_its_code_and_leaves_nothing(tmp_path, case):
    name, damage, config, code, says = CASES[case]
    model = tinymodels.save_model(name, tmp_path / "model")
    damage(model)
    before = checksums(tmp_path)
    with pytest.raises(PissaError, match=f"(?s){says}") as caught:
        convert_to(model, tmp_path / "out", {"rank": 4, **config})
    assert caught.value.code in code.split("|")
    assert "\n" not in caught.value.message
    assert checksums(tmp_path) == before
    assert not list(tmp_path.glob(".out*"))


def test_a_convolution_is_refused_by_name(tmp_path):
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "model")
    with pytest.raises(PissaError, match=r"projection.*Conv2d") as caught:
        convert_to(tmp_path / "model", tmp_path / "out", {"target_modules": ["projection"]})
    assert caught.value.code == "unsupported_module"


HUB_CASES = [
    ("org/nowhere", "repo_not_found", "org/nowhere"),
    ("org/tiny@no-such-branch", "revision_not_found", "no-such-branch"),
    ("hf://org/tiny/no/such/folder", "folder_not_found", "no/such/folder"),
    ("org/secret", "repo_not_found", "org/secret"),
]


@pytest.mark.parametrize(("ref", "code", "says"), HUB_CASES)
def test_what_the_hub_does_not_have(hub, tmp_path, ref, code, says):
    folder = tinymodels.save_model("llama", tmp_path / "model")
    hub.create_repo("org/tiny", folder)
    hub.create_repo("org/secret", folder, private=True)
    with pytest.raises(PissaError, match=says) as caught:
        make_plan(open_source(parse_ref(ref), endpoint=hub.endpoint), parse_config({}))
    assert caught.value.code == code


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(PissaError, match="nowhere does not exist") as caught:
        convert_to(tmp_path / "nowhere", tmp_path / "out")
    assert caught.value.code == "folder_not_found"
