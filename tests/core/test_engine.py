"""The course of a conversion: bytes kept, progress resumed, errors that leave nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tinymodels
import torch
from conversions import checksums, convert_to, course_of, header_of
from safetensors.torch import load_file

from pissa_core.adapters.memory import MemorySink, MemorySource
from pissa_core.engine import convert
from pissa_core.errors import (
    DiskTooSmall,
    MemoryTooSmall,
    NonFiniteWeight,
    NothingMatched,
    OutputExists,
    OutputInsideSource,
    OutputIsSource,
    PissaError,
    RankTooLarge,
    SourceChanged,
    TiedWeight,
    UnsupportedModule,
)
from pissa_core.events import MatrixDone, Planned, Published, Publishing, ShardSealed
from pissa_core.runtime import Runtime
from pissa_core.spec import parse_config


def test_untouched_tensors_headers_and_side_files_are_the_sources(sharded, tmp_path):
    (sharded / "tokenizer.json").write_text('{"left": "as it was"}')
    manifest = convert_to(sharded, tmp_path / "out", {"rank": 2})
    touched = {row["tensor"] for row in manifest["matrices"]}
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(shards) == 3
    for name in shards:
        before, after = sharded / name, tmp_path / "out" / name
        assert header_of(after) == header_of(before)
        old, new = load_file(before), load_file(after)
        changed = {key for key in old if not torch.equal(old[key], new[key])}
        assert changed == touched & old.keys()
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (sharded / name).read_bytes()
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (sharded / index).read_bytes()


def test_the_source_is_not_changed(llama, tmp_path):
    before = checksums(llama)
    convert_to(llama, tmp_path / "out")
    assert checksums(llama) == before


def test_the_manifest_tells_every_other_files_checksum(llama, tmp_path):
    manifest = convert_to(llama, tmp_path / "out")
    found = checksums(tmp_path / "out")
    written = json.loads((tmp_path / "out/pissa_manifest.json").read_text())
    assert written == manifest
    del found["pissa_manifest.json"]
    assert {path: info["sha256"] for path, info in manifest["files"].items()} == found


def test_nothing_but_the_output_is_left(llama, tmp_path):
    convert_to(llama, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


def test_the_card_keeps_the_sources_below_ours(llama, tmp_path):
    convert_to(llama, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert card.index("pissa_init") < card.index("# The original card")
    assert "license: mit" in card
    assert str(tmp_path) not in card


def test_the_bytes_do_not_depend_on_slots_order_or_place(sharded, tmp_path):
    config = {"rank": 3}
    convert_to(sharded, tmp_path / "out", config, slots=1)
    first = checksums(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "first")
    convert_to(sharded, tmp_path / "out", config, slots=4, memory_budget=30 * 10**6)
    assert checksums(tmp_path / "out") == first


def test_memory_and_disk_give_the_same_bytes(sharded, tmp_path):
    contents = {path.name: path.read_bytes() for path in sharded.iterdir()}
    sink = MemorySink()
    list(convert(MemorySource(contents), sink, parse_config({}), Runtime(device="cpu")))
    convert_to(sharded, tmp_path / "out")
    for name in sorted(contents):
        if name.endswith(".safetensors"):
            assert sink.contents[name] == (tmp_path / "out" / name).read_bytes()
    adapter = "pissa_init/adapter_model.safetensors"
    assert sink.contents[adapter] == (tmp_path / "out" / adapter).read_bytes()


def test_events_tell_the_course(sharded, tmp_path):
    events = list(course_of(sharded, tmp_path / "out"))
    kinds = [type(event) for event in events]
    (planned,) = [event for event in events if isinstance(event, Planned)]
    assert kinds[0] is Planned
    assert kinds[-2:] == [Publishing, Published]
    assert kinds.count(ShardSealed) == len(planned.plan.shards)
    assert kinds.count(MatrixDone) == len(planned.plan.matrices)
    sealed = sum(event.nbytes for event in events if isinstance(event, ShardSealed))
    assert sealed == sum(path.stat().st_size for path in sharded.glob("*.safetensors"))


def poison(folder: Path, value: float) -> None:
    def edit(tensors):
        tensors["model.layers.1.self_attn.v_proj.weight"][3, 7] = value
        return tensors

    tinymodels.edit_tensors(folder, edit)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_with_its_index(llama, tmp_path, value):
    poison(llama, value)
    with pytest.raises(NonFiniteWeight, match=r"layers\.1\.self_attn\.v_proj.*\[3, 7\]"):
        convert_to(llama, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_the_index_in_a_conv1d_says_that_it_counts_in_the_transpose(tmp_path):
    def edit(tensors):
        tensors["transformer.h.1.attn.c_attn.weight"][3, 70] = float("nan")
        return tensors

    model = tinymodels.save_model("gpt2", tmp_path / "model")
    tinymodels.edit_tensors(model, edit)
    with pytest.raises(NonFiniteWeight, match=r"c_attn\.weight: .*\[70, 3\] of its transpose$"):
        convert_to(model, tmp_path / "out")


REFUSED = [
    ({"rank": 33}, RankTooLarge, "33"),
    ({"target_modules": "q_proj"}, NothingMatched, "q_proj"),
    ({"target_modules": ["embed_tokens"]}, UnsupportedModule, "embed_tokens"),
]


@pytest.mark.parametrize(("config", "error", "says"), REFUSED)
def test_what_cannot_be_done_is_refused_before_any_weight_is_read(
    llama, tmp_path, config, error, says
):
    with pytest.raises(error, match=says):
        convert_to(llama, tmp_path / "out", config)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_tied_head_is_refused(tmp_path):
    model = tinymodels.save_model("gemma", tmp_path / "model")
    with pytest.raises(TiedWeight, match="lm_head"):
        convert_to(model, tmp_path / "out", {"target_modules": ["lm_head"]})


@pytest.mark.parametrize(
    ("output", "error"),
    [("model", OutputIsSource), ("model/inside", OutputInsideSource), ("full", OutputExists)],
)
def test_outputs_that_cannot_take_the_result(llama, tmp_path, output, error):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    before = checksums(tmp_path)
    with pytest.raises(error):
        convert_to(llama, tmp_path / output)
    assert checksums(tmp_path) == before


def test_a_budget_below_the_largest_matrix_names_it(llama, tmp_path):
    with pytest.raises(MemoryTooSmall, match=r"needs [\d,]+ bytes .* budget is 1,000"):
        convert_to(llama, tmp_path / "out", memory_budget=1000)


def test_a_disk_that_is_too_small_is_said_before_work(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(MemorySink, "free_bytes", lambda self: 1000)
    contents = {path.name: path.read_bytes() for path in llama.iterdir()}
    with pytest.raises(DiskTooSmall, match=r"needs [\d,]+ bytes of disk and 1,000 are free"):
        next(convert(MemorySource(contents), MemorySink(), parse_config({}), Runtime()))


def test_a_source_that_changes_meanwhile_is_noticed(sharded, tmp_path):
    course = course_of(sharded, tmp_path / "out")
    next(course)
    last = sorted(sharded.glob("*.safetensors"))[-1]
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    with pytest.raises(SourceChanged, match=last.name):
        list(course)
    assert not (tmp_path / "out").exists()


def test_errors_are_all_ours(llama, tmp_path):
    (llama / "model.safetensors").write_bytes(b"not a checkpoint at all")
    with pytest.raises(PissaError):
        convert_to(llama, tmp_path / "out")
