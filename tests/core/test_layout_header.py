"""One safetensors header: what is accepted, what each lie is called, and the reference reader."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from pissa_core.adapters.memory import MemorySource
from pissa_core.errors import CheckpointError, HeaderInvalid, ShardTruncated
from pissa_core.layout import BITS, MAX_TENSORS, Shard, parse_header, read_header


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def as_file(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def read(content: bytes) -> Shard:
    source = MemorySource({"w.safetensors": content})
    return read_header(source, "w.safetensors", len(content))


def test_offsets_are_absolute_and_in_the_order_of_the_file():
    header = {"b": entry(offsets=(8, 16)), "a": entry("BF16", (2, 2), (0, 8))}
    content = as_file({"__metadata__": {"format": "pt"}, **header}, bytes(16))
    shard = read(content)
    begin = len(content) - 16
    assert (shard.size, shard.header_size) == (len(content), begin)
    assert [(t.name, t.dtype, t.shape, t.start, t.stop) for t in shard.tensors] == [
        ("a", "BF16", (2, 2), begin, begin + 8),
        ("b", "F32", (2,), begin + 8, begin + 16),
    ]
    assert {tensor.shard for tensor in shard.tensors} == {"w.safetensors"}


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_every_dtype_has_the_width_the_reference_gives_it(dtype):
    content = as_file({"t": entry(dtype, (8,), (0, BITS[dtype]))}, bytes(BITS[dtype]))
    deserialize(content)
    assert read(content).tensors[0].nbytes == BITS[dtype]


def test_empty_tensors_scalars_and_padding_are_fine():
    header = {
        "none": entry("F32", (0, 5), (0, 0)),
        "scalar": entry("F32", (), (0, 4)),
        "last": entry("U8", (0,), (4, 4)),
    }
    assert len(read(as_file(json.dumps(header).encode() + b"   ", bytes(4))).tensors) == 3


def test_a_long_header_is_read_whole():
    header = {f"t{i}": entry("U8", (1,), (i, i + 1)) for i in range(5000)}
    content = as_file(header, bytes(5000))
    assert len(content) > 3 << 16
    assert len(read(content).tensors) == 5000


LIES = {
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "'b' overlaps 'a'"),
    "same range twice": ({"a": entry(), "b": entry()}, 8, "'b' overlaps 'a'"),
    "hole": ({"a": entry(), "b": entry(offsets=(12, 20))}, 20, "'b' leaves a hole after 'a'"),
    "first offset": ({"a": entry(offsets=(4, 12))}, 12, "'a' leaves a hole after the header"),
    "trailing bytes": ({"a": entry()}, 11, "3 bytes follow the last tensor"),
    "wrong size": ({"a": entry(shape=(3,))}, 8, r"'a' has 8 bytes, which does not fit.*\[3\]"),
    "huge shape": ({"a": entry(shape=(2**40, 2**40))}, 8, "more than 2\\^60 elements"),
    "huge times zero": ({"a": entry(shape=(2**40, 2**40, 0))}, 8, "more than 2\\^60"),
    "negative": ({"a": entry(shape=(-1, -2))}, 8, "the number -1 is negative"),
    "minus zero": (b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', 0, "negative"),
    "long number": ({"a": entry(shape=(10**30,))}, 8, "negative or too large"),
    "float in shape": ({"a": entry(shape=(2.0,))}, 8, "shape of 'a' is not a list of whole"),
    "bool in shape": ({"a": entry(shape=(True,))}, 4, "shape of 'a' is not a list of whole"),
    "shape is none": ({"a": {**entry(), "shape": None}}, 8, "shape of 'a' is not a list"),
    "backward": ({"a": entry(offsets=(8, 0))}, 8, "data_offsets of 'a' are not"),
    "three offsets": ({"a": entry(offsets=(0, 8, 8))}, 8, "data_offsets of 'a' are not"),
    "unknown dtype": ({"a": entry("F33")}, 8, "unknown dtype 'F33'"),
    "dtype is a list": ({"a": {**entry(), "dtype": ["F32"]}}, 8, "unknown dtype"),
    "half a byte": ({"a": entry("F4", (3,), (0, 1))}, 1, "fill no whole bytes"),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "has not exactly dtype"),
    "unknown field": ({"a": {**entry(), "strides": [1]}}, 8, "has not exactly dtype"),
    "entry is a list": ({"a": [1, 2]}, 8, "has not exactly dtype"),
    "metadata": ({"__metadata__": {"n": 1}, "a": entry()}, 8, "__metadata__ is not an object"),
    "metadata is none": ({"__metadata__": None, "a": entry()}, 8, "__metadata__ is not"),
    "empty name": ({"": entry()}, 8, "the tensor name '' is empty"),
    "surrogate": (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0, "Unicode"),
    "not JSON": (b"{'a': 1}", 0, "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', 0, "not valid JSON"),
    "NaN": (b'{"a": NaN}', 0, "NaN is no JSON number"),
    "list": (b"[]", 0, "it is a JSON list, not an object"),
    "nothing": (b"", 0, "not valid JSON"),
    "twice": (b'{"a":1,"b":2,"a":1}', 0, "'a' appears twice"),
    "nested": (b"[" * 100_000, 0, "not valid JSON"),
}


@pytest.mark.parametrize("case", sorted(LIES))
def test_every_lie_has_its_sentence(case):
    header, nbytes, sentence = LIES[case]
    with pytest.raises(HeaderInvalid, match=rf"^the header of w\.safetensors is.*{sentence}"):
        read(as_file(header, bytes(nbytes)))


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        (0, "holds 0 bytes; a safetensors file begins with 8"),
        (7, "holds 7 bytes"),
        (8, r"header alone needs \d+ bytes and the file holds 8"),
        (40, r"header alone needs \d+ bytes and the file holds 40"),
        (-1, r"header promises 77 bytes and the file holds 76"),
        (-8, r"header promises 77 bytes and the file holds 69"),
    ],
)
def test_a_file_cut_short_says_what_was_expected_and_what_was_found(size, sentence):
    content = as_file({"a": entry()}, bytes(8))
    assert len(content) == 77
    with pytest.raises(ShardTruncated, match=rf"^w\.safetensors .*{sentence}"):
        read(content[:size])


@pytest.mark.parametrize("length", [100_000_001, 2**40, 2**63, 2**64 - 1])
def test_an_absurd_length_is_no_header(length):
    with pytest.raises(HeaderInvalid, match=f"give a header of {length} bytes; at most 100000000"):
        read(length.to_bytes(8, "little") + b"{}" + bytes(100))


def test_a_git_lfs_pointer_says_what_to_run():
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    with pytest.raises(HeaderInvalid, match="is a git-lfs pointer") as caught:
        read(pointer)
    assert caught.value.hint == "run `git lfs pull`"


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":{}' + b',"a":{}' * 10**6 + b"}",
        b'{"a":{}' + b',"a":{}' * MAX_TENSORS + b"}",
        b'{"a":{"dtype":"U8","shape":[' + b"1," * (4 * 10**6) + b'1],"data_offsets":[0,1]}}',
    ],
    ids=["entries", "one entry too many", "dimensions"],
)
def test_a_million_entries_are_refused_without_being_parsed(text):
    tracemalloc.start()
    try:
        with pytest.raises(HeaderInvalid, match=f"more than {MAX_TENSORS} entries"):
            parse_header(text, path="w.safetensors", size=len(text) + 8)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def check_against_the_reference(content: bytes) -> None:
    """What we accept, the reference accepts and reads alike; what we refuse has our error."""
    try:
        shard = read(content)
    except CheckpointError:
        return
    try:
        reference = dict(deserialize(content))
    except SafetensorError as error:
        raise AssertionError(f"accepted, but the reference says: {error}") from error
    ours = {t.name: (t.dtype, list(t.shape), content[t.start : t.stop]) for t in shard.tensors}
    assert ours == {
        name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"]))
        for name, tensor in reference.items()
    }


names = st.text(max_size=5) | st.sampled_from(["__metadata__", "a", "weight"])
numbers = st.integers(-2, 20) | st.sampled_from([2**31, 2**63, 2**64, 10**25]) | st.floats()
odd = st.recursive(
    st.none() | st.booleans() | numbers | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
near_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(BITS)) | names,
        "shape": st.lists(st.integers(0, 4) | numbers, max_size=3) | odd,
        "data_offsets": st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted) | odd,
    }
)


@st.composite
def nearly_valid_files(draw: st.DrawFn) -> bytes:
    """Files of well-laid tensors, with a few bytes of the result altered."""
    header: dict[str, Any] = {}
    offset = 0
    for name in draw(st.lists(names.filter(lambda name: name != "__metadata__"), unique=True)):
        dtype, shape = draw(st.sampled_from(sorted(BITS))), draw(st.lists(st.integers(0, 4)))
        count = 1
        for extent in shape:
            count *= extent
        stop = offset + count * BITS[dtype] // 8
        header[name], offset = entry(dtype, shape, (offset, stop)), stop
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(names, names, max_size=2))
    content = bytearray(as_file(header, bytes(min(offset, 4096))))
    for position, value in draw(st.lists(st.tuples(st.integers(0), st.integers(0, 255)))):
        content[position % len(content)] = value
    return bytes(content)


@settings(max_examples=300, deadline=None)
@given(nearly_valid_files())
def test_altered_files_never_surprise(content):
    check_against_the_reference(content)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(names, near_entries | odd, max_size=3), st.integers(0, 48))
@example({"a": entry("F4", (2,), (0, 1))}, 1)
@example({"a": entry(), "b": entry(offsets=(0, 0), shape=(0,))}, 8)
def test_headers_of_odd_values_never_surprise(header, nbytes):
    check_against_the_reference(as_file(header, bytes(nbytes)))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_never_surprise(text):
    check_against_the_reference(text)
    check_against_the_reference(as_file(text))
