"""Whatever a checkpoint or an adapter holds, reading it ends, in bounded memory, with a code."""

from __future__ import annotations

import json
import random
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pissa_core.adapters.memory import MemorySource
from pissa_core.errors import LONGEST, PissaError
from pissa_core.fold.adapter import read_adapter as read_for_fold
from pissa_core.fold.belonging import trace as trace_fold
from pissa_core.layout import read_layout
from pissa_core.layout.sidefiles import read_card
from pissa_core.lora.adapter import read_adapter as read_for_lora
from pissa_core.lora.finding import Place, find_place
from pissa_core.lora.lineage import trace
from pissa_core.refs import LocalRef
from pissa_core.report.metadata import split_card
from pissa_core.verify.asking import _Findings, _read_manifest
from pissa_core.verify.claims import shape_faults

MEMORY = 50_000_000
"""Far more than any of these files needs, far less than what one number in them can ask for."""

words = st.sampled_from(
    ["a.weight", "model.safetensors", "../../etc/passwd", "/etc/passwd", "a/../b", "", "\0", "\\..",
     "é", "e\u0301", "\u202egnp.exe", "🤗" * 300, "x" * 5000, "C:\\x", ".", "~", "F32", "BF16",
     "LORA", "sha256", "hf://org/name", "pissa", "base-to-pissa"]
)  # fmt: skip
numbers = st.one_of(
    st.integers(-2, 20), st.sampled_from([2**31, 2**53, 2**63, 2**64, 10**30, 0.5, 1e308, -1e9])
)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=4)
    ),
    max_leaves=12,
)  # fmt: skip


def tensor_file(table: dict[str, Any], data: bytes) -> bytes:
    header = json.dumps(table).encode()
    return len(header).to_bytes(8, "little") + header + data


def f32(shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


FACTORS = tensor_file(
    {
        "base_model.model.q.lora_A.weight": f32([2, 4], 0, 32),
        "base_model.model.q.lora_B.weight": f32([4, 2], 32, 64),
    },
    bytes(64),
)
ADAPTER_CONFIG = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"], "rank_pattern": {},
    "alpha_pattern": {}, "use_rslora": False, "init_lora_weights": True, "bias": "none",
    "base_model_name_or_path": "org/name", "modules_to_save": None, "use_dora": False,
}  # fmt: skip
MANIFEST = {
    "schema": 1, "kind": "base-to-pissa", "source": {"ref": "hf://org/name", "commit": None},
    "files": {"pissa_init/adapter_model.safetensors": {"sha256": "0" * 64, "size": 1}},
    "matrices": [{"module": "q", "scaling": 1.0}], "config": {}, "totals": {},
}  # fmt: skip
INDEX = {"metadata": {}, "weight_map": {"a.weight": "model-00001-of-00001.safetensors"}}
CHECKPOINT = {
    "config.json": json.dumps({"architectures": ["X"], "text_config": {}}).encode(),
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    "model-00001-of-00001.safetensors": tensor_file({"a.weight": f32([2, 2], 0, 16)}, bytes(16)),
}


def changed(original: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Return JSON with one field of `original` replaced or added, or another value altogether."""

    def change(key: str, value: Any) -> bytes:
        return json.dumps({**original, key: value}).encode()

    fields = st.one_of(st.sampled_from(sorted(original) or ["a"]), words)
    return st.one_of(
        st.builds(change, fields, anything),
        anything.map(lambda value: json.dumps(value).encode()),
        st.binary(max_size=60),
        st.sampled_from([b"[" * 200_000, b'{"a":' * 100_000, b"9" * 50_000, b"\xff\xfe{}"]),
    )


def ends_well(read: Any) -> None:
    """Hold `read` to an answer or an error with a code, in bounded memory."""
    refusal: PissaError | None = None
    tracemalloc.start()
    try:
        read()
    except PissaError as error:
        refusal = error
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MEMORY
    if refusal is not None:
        assert refusal.code != "internal", refusal
        assert len(refusal.message) < 10_000


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(CHECKPOINT)), st.data())
def test_a_checkpoint_s_json_may_say_anything(path, data):
    original = {"config.json": {"architectures": ["X"]}, "model.safetensors.index.json": INDEX}
    content = data.draw(changed(original.get(path, {})))
    if path.endswith(".safetensors"):
        content = len(content).to_bytes(8, "little") + content
    ends_well(lambda: read_layout(MemorySource({**CHECKPOINT, path: content})))


@settings(max_examples=60, deadline=None)
@given(words, words, anything, anything, anything)
def test_a_header_may_say_anything(name, dtype, shape, offsets, metadata):
    entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    content = tensor_file({name: entry, "__metadata__": metadata}, bytes(16))
    ends_well(
        lambda: read_layout(
            MemorySource({**CHECKPOINT, "model-00001-of-00001.safetensors": content})
        )
    )


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12))
def test_bits_of_a_file_may_be_turned_anywhere(seed, count):
    chance = random.Random(seed)
    path = chance.choice(sorted(CHECKPOINT))
    content = bytearray(CHECKPOINT[path])
    for _ in range(count):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    ends_well(lambda: read_layout(MemorySource({**CHECKPOINT, path: bytes(content)})))


@settings(max_examples=60, deadline=None)
@given(words)
def test_a_file_may_have_any_name(name):
    ends_well(lambda: read_layout(MemorySource({**CHECKPOINT, name: b"x"})))


@pytest.mark.parametrize("read", [read_for_fold, read_for_lora])
@settings(max_examples=80, deadline=None)
@given(changed(ADAPTER_CONFIG))
def test_an_adapter_s_config_may_say_anything(read, config):
    files = {"adapter_config.json": config, "adapter_model.safetensors": FACTORS}
    ends_well(lambda: read(MemorySource(files)))


@pytest.mark.parametrize("read", [read_for_fold, read_for_lora])
@settings(max_examples=40, deadline=None)
@given(words, anything, anything)
def test_an_adapter_s_header_may_say_anything(read, dtype, shape, offsets):
    entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    content = tensor_file({"base_model.model.q.lora_A.weight": entry}, bytes(64))
    config = json.dumps(ADAPTER_CONFIG).encode()
    files = {"adapter_config.json": config, "adapter_model.safetensors": content}
    ends_well(lambda: read(MemorySource(files)))


@settings(max_examples=100, deadline=None)
@given(changed(MANIFEST), anything)
def test_a_manifest_may_say_anything(manifest, base):
    config = json.dumps({**ADAPTER_CONFIG, "base_model_name_or_path": base}).encode()
    adapter = MemorySource({"adapter_config.json": config, "adapter_model.safetensors": FACTORS})
    model = MemorySource({"pissa_manifest.json": manifest, "config.json": b"{}"})

    def read() -> None:
        both = read_for_lora(adapter)
        place = find_place(LocalRef("/model"), lambda ref: model)
        assert isinstance(place, Place)
        trace(both, both, LocalRef("/model/pissa_init"), adapter, lambda ref: model)

    ends_well(read)


@settings(max_examples=100, deadline=None)
@given(changed(MANIFEST), anything, anything)
def test_a_residual_s_manifest_may_say_anything(manifest, base, revision):
    config = {**ADAPTER_CONFIG, "base_model_name_or_path": base, "revision": revision}
    files = {"adapter_config.json": json.dumps(config).encode()}
    adapter = MemorySource({**files, "adapter_model.safetensors": FACTORS})
    residual = MemorySource({**CHECKPOINT, "pissa_manifest.json": manifest})
    ends_well(lambda: trace_fold(residual, read_for_fold(adapter), lambda ref: residual))


@settings(max_examples=100, deadline=None)
@given(changed(MANIFEST))
def test_a_manifest_to_be_verified_may_say_anything(content):
    found = _Findings()

    def read() -> None:
        manifest = _read_manifest(MemorySource({"pissa_manifest.json": content}), found)
        found.faults += shape_faults(manifest) if manifest else []

    ends_well(read)


@pytest.mark.parametrize("read", [read_for_fold, read_for_lora])
def test_a_config_of_many_megabytes_is_not_read(read):
    config = json.dumps({**ADAPTER_CONFIG, "note": "x" * 60_000_000}).encode()
    files = {"adapter_config.json": config, "adapter_model.safetensors": FACTORS}
    source = MemorySource(files)
    ends_well(lambda: read(source))
    with pytest.raises(PissaError, match="at most"):
        read(source)


def test_a_card_s_metadata_cannot_take_minutes_to_read():
    entry = "- {name: x, value: 1.0}\n"
    text = "---\nlicense: mit\nresults:\n" + entry * (2 * 10**6 // len(entry)) + "---\nbody"
    assert split_card(text) == ({}, "body")
    assert split_card("---\nlicense: mit\n---\nbody") == ({"license": "mit"}, "body")


def test_a_card_of_many_megabytes_is_none():
    assert read_card(MemorySource({"README.md": b"x" * (16 << 20)}))
    assert read_card(MemorySource({"README.md": b"x" * ((16 << 20) + 1)})) == ""


@pytest.mark.parametrize("read", [read_for_fold, read_for_lora])
def test_a_config_that_would_fill_the_memory_is_not_parsed(read):
    config = b'{"peft_type": "LORA", "x": [' + b"[]," * (5 << 20) + b"[]]}"
    files = {"adapter_config.json": config, "adapter_model.safetensors": FACTORS}
    ends_well(lambda: read(MemorySource(files)))
    with pytest.raises(PissaError, match="has more than 4000000 values"):
        read(MemorySource(files))


def test_a_message_never_quotes_a_whole_file():
    config = json.dumps({**ADAPTER_CONFIG, "lora_bias": "x" * 10**6}).encode()
    files = {"adapter_config.json": config, "adapter_model.safetensors": FACTORS}
    with pytest.raises(PissaError) as caught:
        read_for_lora(MemorySource(files))
    assert 100 < len(caught.value.message) <= LONGEST + 1
