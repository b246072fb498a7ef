"""Whole checkpoints: which files are the weights, what goes along, what is wrong with others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hub.blobs import Bytes
from safetensors.torch import save

from pissa_core.adapters.local import LocalSource
from pissa_core.adapters.memory import MemorySource
from pissa_core.errors import (
    HeaderInvalid,
    IndexMissingShard,
    NoSafetensors,
    QuantizedCheckpoint,
    ShardTruncated,
    UnsafePath,
)
from pissa_core.layout import Layout, read_layout

CONFIG = b'{"architectures": ["LlamaForCausalLM"]}'
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def weights(*names: str) -> bytes:
    return save({name: torch.ones(4, 4) for name in names}, metadata={"format": "pt"})


def index(weight_map: Mapping[str, Any]) -> bytes:
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()


def single(**more: bytes) -> dict[str, bytes]:
    return {"config.json": CONFIG, "model.safetensors": weights("a"), **more}


def sharded() -> dict[str, bytes]:
    return {
        "config.json": CONFIG,
        FIRST: weights("a", "b"),
        SECOND: weights("c"),
        INDEX: index({"a": FIRST, "b": FIRST, "c": SECOND}),
    }


def layout(contents: Mapping[str, bytes]) -> Layout:
    return read_layout(MemorySource(contents, ref="hf://org/name@abc"))


# --- what is found ----------------------------------------------------------------------------


def test_a_single_file():
    found = layout(single())
    assert found.config == json.loads(CONFIG)
    assert [shard.path for shard in found.shards] == ["model.safetensors"]
    assert (found.index, found.card) == (None, None)
    assert found.side_files == ("config.json",)


def test_shards_and_their_index():
    found = layout(sharded())
    assert [shard.path for shard in found.shards] == [FIRST, SECOND]
    assert found.index == INDEX
    assert {name: tensor.shard for name, tensor in found.tensors.items()} == {
        "a": FIRST,
        "b": FIRST,
        "c": SECOND,
    }
    assert found.side_files == ("config.json",)


def test_the_single_file_wins_over_an_index_as_in_transformers():
    found = layout({**sharded(), "model.safetensors": weights("z")})
    assert [shard.path for shard in found.shards] == ["model.safetensors"]
    assert found.left_out == (FIRST, SECOND, INDEX)


@pytest.mark.parametrize("named", ["other.safetensors", "sub/other.safetensors"])
def test_the_file_that_the_config_names_wins(named):
    config = json.dumps({"transformers_weights": named}).encode()
    found = layout({**single(), named: weights("named"), "config.json": config})
    assert list(found.tensors) == ["named"]
    assert found.left_out == ("model.safetensors",)


def test_the_index_that_the_config_names_wins():
    config = json.dumps({"transformers_weights": "other.safetensors.index.json"}).encode()
    contents = {**sharded(), "config.json": config}
    contents["other.safetensors.index.json"] = contents.pop(INDEX)
    assert layout(contents).index == "other.safetensors.index.json"


def test_shards_may_lie_in_a_folder():
    contents = {"config.json": CONFIG, "w/1.safetensors": weights("a")}
    found = layout({**contents, INDEX: index({"a": "w/1.safetensors"})})
    assert [shard.path for shard in found.shards] == ["w/1.safetensors"]


def test_a_tensor_that_the_index_forgot_is_still_there():
    assert "b" in layout({**sharded(), INDEX: index({"a": FIRST, "c": SECOND})}).tensors


def test_folders_and_files_with_odd_names(tmp_path):
    folder = tmp_path / "Modèle 日本 #1 %20"
    folder.mkdir()
    for path, content in single(**{"Ünïcode \\ file.txt": b"kept"}).items():
        (folder / path).write_bytes(content)
    assert read_layout(LocalSource(folder)).side_files == ("config.json", "Ünïcode \\ file.txt")


# --- what goes along --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        ".gitattributes",
        "LICENSE",
        "chat_template.jinja",
        "generation_config.json",
        "images/plot.png",
        "modeling_custom.py",
        "sub/README.md",
        "tokenizer.json",
        "tokenizer.model",
    ],
)
def test_side_files_go_along(path):
    found = layout(single(**{path: b"x"}))
    assert path in found.side_files
    assert found.left_out == ()


@pytest.mark.parametrize(
    "path",
    [
        ".cache/huggingface/download/config.json.metadata",
        ".git/config",
        "assets/.git",
        "adapter_config.json",
        "adapter_model.safetensors",
        "consolidated.safetensors",
        "flax_model.msgpack",
        "model.fp16.safetensors",
        "model.q4.GGUF",
        "model.safetensors.index.fp16.json",
        "old/adapter_config.json",
        "onnx/model.onnx",
        "onnx/model.onnx_data",
        "optimizer.pt",
        "original/params.json",
        "original/tokenizer.model",
        "pissa_init/adapter_config.json",
        "pissa_manifest.json",
        "pissa_report/energy.svg",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
        "rng_state.pth",
        "rust_model.ot",
        "sub/model.safetensors",
        "tf_model.h5",
        "training_args.bin",
        "weights.ckpt",
    ],
)
def test_what_must_not_go_along_is_left_out(path):
    found = layout(single(**{path: b"x"}))
    assert found.left_out == (path,)
    assert found.side_files == ("config.json",)


def test_the_card_is_in_neither_list():
    found = layout(single(**{"README.md": b"# A model"}))
    assert found.card == "README.md"
    assert found.side_files == ("config.json",)
    assert found.left_out == ()


def test_the_further_modules_of_a_sentence_transformer_go_along():
    modules = json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]).encode()
    more = {"modules.json": modules, "2_Dense/model.safetensors": b"x", "1_Pooling/c.json": b"{}"}
    found = layout(single(**more, **{"onnx/model.onnx": b"x", "3/model.safetensors": b"x"}))
    assert set(found.side_files) == {"config.json", *more}
    assert found.left_out == ("3/model.safetensors", "onnx/model.onnx")


@pytest.mark.parametrize("root", ["", ".", "./"])
def test_a_module_that_is_the_model_itself_opens_no_door_to_other_weights(root):
    modules = json.dumps([{"path": root}, {"path": "2_Dense/"}]).encode()
    more = {"modules.json": modules, "2_Dense/model.safetensors": b"x"}
    found = layout(single(**more, **{"pytorch_model.bin": b"x"}))
    assert set(found.side_files) == {"config.json", *more}
    assert found.left_out == ("pytorch_model.bin",)


@pytest.mark.parametrize(
    "modules", [b"", b"{}", b'{"a": 1}', b"[1]", b"[{}]", b"\xff", b"[" * 9999]
)
def test_a_modules_file_that_is_none_is_just_carried(modules):
    found = layout(single(**{"modules.json": modules, "2_Dense/model.safetensors": b"x"}))
    assert found.side_files == ("config.json", "modules.json")


# --- what is wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("others", "sentence", "hint"),
    [
        ({}, "it holds config.json", "name a model saved with"),
        ({"pytorch_model.bin": b"x"}, r"it holds pytorch_model\.bin, config", "save_pretrained"),
        ({"tf_model.h5": b"x"}, r"it holds tf_model\.h5", "save_pretrained"),
        ({"weights.safetensors": b"x"}, r"it holds weights\.safetensors", "rename or convert"),
        ({"sub/model.safetensors": b"x"}, "it holds sub/model", "in the subfolder sub;"),
        ({"adapter_config.json": b"{}"}, "it holds adapter_config", "this is an adapter"),
        ({f"{n}.bin": b"" for n in range(9)}, r"0\.bin, 1\.bin.* and 5 more", "save_pretrained"),
    ],
)
def test_no_safetensors_says_what_was_found_instead(others, sentence, hint):
    with pytest.raises(NoSafetensors, match=f"has neither model.safetensors nor.*{sentence}") as e:
        layout({"config.json": CONFIG, **others})
    assert hint in e.value.hint


def test_an_empty_folder_says_so():
    with pytest.raises(NoSafetensors, match="it holds no files at all"):
        layout({})


def test_named_weights_that_are_not_there():
    config = b'{"transformers_weights": "other.safetensors"}'
    with pytest.raises(NoSafetensors, match=r"the weights are in 'other\.safetensors', which is"):
        layout({**single(), "config.json": config})


@pytest.mark.parametrize("named", ["pytorch_model.bin", 7, ["a.safetensors"]])
def test_named_weights_of_another_kind(named):
    config = json.dumps({"transformers_weights": named}).encode()
    with pytest.raises(HeaderInvalid, match="transformers_weights is"):
        layout({**single(), "config.json": config})


@pytest.mark.parametrize("named", ["../up.safetensors", "/abs.safetensors", "a\\b.safetensors"])
def test_named_weights_outside_the_folder(named):
    config = json.dumps({"transformers_weights": named}).encode()
    with pytest.raises(UnsafePath, match=r"transformers_weights in config\.json names"):
        layout({**single(), "config.json": config})


def test_weights_without_a_config():
    with pytest.raises(HeaderInvalid, match=r"has weights but no config\.json"):
        layout({"model.safetensors": weights("a")})


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (b"{", r"config\.json of .* is not valid JSON"),
        (b"", r"config\.json of .* is not valid JSON"),
        (b"\xff\xfe", r"config\.json of .* is not valid JSON"),
        (b"[" * 10**6, r"config\.json of .* is not valid JSON"),
        (b"[]", "holds a JSON list, not an object"),
        (b" " * (17 << 20), "holds 17825792 bytes; at most 16777216"),
    ],
)
def test_a_config_that_is_none(config, sentence):
    with pytest.raises(HeaderInvalid, match=sentence):
        layout({**single(), "config.json": config})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{}", "has no weight_map"),
        (index({}), "has no weight_map, or an empty one"),
        (b'{"weight_map": []}', "has no weight_map"),
        (index({"a": 1}), "gives 'a' the file 1, which is not a string"),
        (index({"a": None}), "gives 'a' the file None"),
        (b"not JSON", r"index.json of .* is not valid JSON"),
        (b'{"weight_map": {' + b'"a":"b",' * (4 * 10**6 + 1), "has more than 4000000 values"),
    ],
)
def test_an_index_that_is_none(content, sentence):
    with pytest.raises(HeaderInvalid, match=sentence):
        layout({**sharded(), INDEX: content})


def test_an_index_that_names_a_missing_shard():
    contents = sharded()
    del contents[SECOND]
    with pytest.raises(IndexMissingShard, match=rf"{INDEX} names the shard '{SECOND}', which"):
        layout(contents)


def test_an_index_that_names_a_missing_tensor():
    weight_map = {"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND}
    with pytest.raises(IndexMissingShard, match=f"the tensor 'd' is in {SECOND}, whose header"):
        layout({**sharded(), INDEX: index(weight_map)})


def test_an_index_that_names_the_wrong_shard():
    weight_map = {"a": FIRST, "b": SECOND, "c": SECOND}
    with pytest.raises(IndexMissingShard, match=f"the tensor 'b' is in {SECOND}, whose header"):
        layout({**sharded(), INDEX: index(weight_map)})


def test_a_tensor_in_two_shards():
    with pytest.raises(HeaderInvalid, match=f"'a' is in two shards, {FIRST} and {SECOND}"):
        layout({**sharded(), SECOND: weights("a", "c")})


@pytest.mark.parametrize(
    "path",
    [
        "../model.safetensors",
        "sub/../../model.safetensors",
        "/etc/model.safetensors",
        "./model.safetensors",
        "sub//model.safetensors",
        "",
        "..\\model.safetensors",
        "C:\\model.safetensors",
        "model\0.safetensors",
    ],
)
def test_an_index_that_points_outside(path):
    with pytest.raises(UnsafePath, match=r"weight_map in .* which points outside the"):
        layout({**sharded(), INDEX: index({"a": FIRST, "z": path})})


@pytest.mark.parametrize("path", ["config.json", "pissa_init/adapter_model.safetensors"])
def test_an_index_that_names_what_is_no_shard(path):
    contents = {**sharded(), "pissa_init/adapter_model.safetensors": weights("z")}
    with pytest.raises(UnsafePath, match="which is not the name of a shard"):
        layout({**contents, INDEX: index({"a": FIRST, "z": path})})


def test_files_outside_the_checkpoint_are_refused():
    with pytest.raises(UnsafePath, match=r"a file of the checkpoint names '\.\./escape'"):
        layout(single(**{"../escape": b""}))


def test_names_that_are_no_text_are_refused():
    with pytest.raises(UnsafePath, match=r"not valid Unicode, '\\udcff\.txt'"):
        layout(single(**{"\udcff.txt": b""}))


def test_a_shard_cut_short_is_named():
    with pytest.raises(ShardTruncated, match=f"^{SECOND} was cut short: its header promises"):
        layout({**sharded(), SECOND: weights("c")[:-1]})


def test_a_shard_with_a_lying_header_is_named():
    with pytest.raises(HeaderInvalid, match=f"^the header of {FIRST} is invalid: 1 bytes follow"):
        layout({**sharded(), FIRST: weights("a", "b") + b"x"})


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config \(gptq\)"),
        ({"quantization_config": {"load_in_4bit": True}}, "has a quantization_config$"),
        ({"compression_config": {"format": "x"}}, "has a compression_config"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, r"\(fp8\)"),
    ],
)
def test_a_quantised_model_is_refused_by_its_config(config, sentence):
    with pytest.raises(QuantizedCheckpoint, match=f"is quantised: its config.json.*{sentence}"):
        layout({**single(), "config.json": json.dumps(config).encode()})


@pytest.mark.parametrize("name", ["q.qweight", "q.weight_scale_inv", "q.SCB"])
def test_a_quantised_model_is_refused_by_its_tensors(name):
    with pytest.raises(QuantizedCheckpoint, match=f"holds '{name}', which only quantised"):
        layout({**single(), "model.safetensors": weights("a", name)})


@pytest.mark.parametrize("value", [None, {}, False])
def test_an_empty_quantization_config_means_nothing(value):
    config = json.dumps({"quantization_config": value, "text_config": None}).encode()
    assert layout({**single(), "config.json": config}).config["quantization_config"] == value


# --- what it costs ----------------------------------------------------------------------------


class Zeros:
    """Many bytes of a shard that are only made when asked for: a header, then zeros."""

    def __init__(self, header: bytes, size: int) -> None:
        self._header, self.size = header, size
        self.sha256 = hashlib.sha256(header).hexdigest()  # no true one; nothing is fetched here

    def read(self, start: int, stop: int) -> bytes:
        head = self._header[start:stop]
        return head + bytes(stop - start - len(head))


def test_the_layout_of_a_sharded_repo_costs_headers_only(hub, open_hub):
    shape, shards = (4096, 4096), 6
    files: dict[str, Any] = {"config.json": CONFIG}
    weight_map = {}
    for shard in range(shards):
        path = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        names = [f"model.layers.{shard}.{part}.weight" for part in range(100)]
        nbytes = 2 * shape[0] * shape[1]
        table = {
            name: {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": [number * nbytes, (number + 1) * nbytes],
            }
            for number, name in enumerate(names)
        }
        text = json.dumps(table).encode()
        header = len(text).to_bytes(8, "little") + text
        files[path] = Zeros(header, len(header) + nbytes * len(names))
        weight_map |= dict.fromkeys(names, path)
    files[INDEX] = Bytes(index(weight_map))
    hub.create_repo("org/large", files=files)

    found = read_layout(open_hub("org/large"))

    assert len(found.tensors) == 600
    assert sum(shard.size for shard in found.shards) > 20e9
    assert hub.sent_bytes() < 600_000
    assert len(hub.requests("^/blobs/")) == shards
    assert len(hub.requests("^/org/large/resolve/")) == shards + 2
    assert len(hub.requests("^/api/")) == 1
