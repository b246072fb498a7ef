"""One safetensors header, read strictly and in bounded memory.

The format (https://github.com/huggingface/safetensors#format): eight bytes of header length,
little-endian; a JSON object, name → dtype, shape, data_offsets; the data, contiguous up to the
end of the file. What the reference reader refuses is refused here, and a little more: duplicate
names, empty names, unknown fields, and headers too large for any model there is.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from pissa_core.errors import HeaderInvalid, ShardTruncated
from pissa_core.ports import CheckpointSource

MAX_HEADER = 100_000_000
"""Bytes; the reference reader's own limit."""

MAX_TENSORS = 200_000
"""Tensors in one file. Whole models of a trillion parameters, an entry an expert, have fewer."""

BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""Bits of one element, by safetensors' spelling of the dtype."""

_PROBE = 16 << 10  # one read for a usual 5 GB shard, whose header has 3 kB; experts take two
_COMMAS_PER_TENSOR = 16  # bounds the numbers in shapes as well as the entries
_FIELDS = {"dtype", "shape", "data_offsets"}
_REPAIR = "download or save the file again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: what it is, and its absolute byte range ``[start, stop)`` in the shard's file."""

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file; `header_size` counts the eight bytes of length, too."""

    path: str
    size: int
    header_size: int
    tensors: tuple[TensorInfo, ...]


def read_header(source: CheckpointSource, path: str, size: int) -> Shard:
    """Read and check the header of one file of `source`, and no more than 16 kB beyond it.

    Raises:
        ShardTruncated: if the file is shorter than its header promises.
        HeaderInvalid: if the header breaks the format.
    """
    first = source.read(path, 0, min(size, _PROBE))
    header_size = 8 + header_length(first, path=path, size=size)
    if header_size > len(first):
        first += source.read(path, len(first), header_size)
    return parse_header(first[8:header_size], path=path, size=size)


def header_length(first: bytes, *, path: str, size: int) -> int:
    """Return the length of the JSON header, which the file's first eight bytes give."""
    if size < 8:
        raise ShardTruncated(
            f"{path} holds {size} bytes; a safetensors file begins with 8 bytes of header length",
            hint=_REPAIR,
        )
    length = int.from_bytes(first[:8], "little")
    if first.startswith(b"version https://git-lfs"):
        raise HeaderInvalid(
            f"{path} is a git-lfs pointer, not the file it points to", hint="run `git lfs pull`"
        )
    if length > MAX_HEADER:
        raise HeaderInvalid(
            f"{path}: its first 8 bytes give a header of {length} bytes; at most {MAX_HEADER} "
            "are allowed, so this is no safetensors file, or a damaged one",
            hint=_REPAIR,
        )
    if 8 + length > size:
        raise ShardTruncated(
            f"{path} was cut short: its header alone needs {8 + length} bytes and the file "
            f"holds {size}",
            hint=_REPAIR,
        )
    return length


def parse_header(text: bytes, *, path: str, size: int) -> Shard:
    """Check a JSON header against the size of its file.

    Args:
        text: the header, without the eight bytes of its length.
        path: the file, for messages and `TensorInfo.shard`.
        size: of the whole file in bytes.

    Raises:
        ShardTruncated: if the file is shorter than the header promises.
        HeaderInvalid: if the header breaks the format.
    """
    table = _parse_json(text, path)
    _check_metadata(table.pop("__metadata__", {}), path)
    begin = 8 + len(text)
    tensors = sorted(
        (_entry(name, entry, path, begin) for name, entry in table.items()),
        key=lambda tensor: (tensor.start, tensor.stop),
    )
    _check_contiguous(tensors, path, begin)
    end = tensors[-1].stop if tensors else begin
    if size < end:
        raise ShardTruncated(
            f"{path} was cut short: its header promises {end} bytes and the file holds {size}",
            hint=_REPAIR,
        )
    if size > end:
        raise _invalid(path, f"{size - end} bytes follow the last tensor, which ends at byte {end}")
    return Shard(path, size, begin, tuple(tensors))


def _parse_json(text: bytes, path: str) -> dict[str, Any]:
    # Counted before parsing: a header of a million entries must not cost gigabytes to refuse.
    if text.count(b"{") > MAX_TENSORS + 1 or text.count(b",") > _COMMAS_PER_TENSOR * MAX_TENSORS:
        raise _invalid(path, f"it has more than {MAX_TENSORS} entries")
    try:
        table = json.loads(
            text.decode(),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_whole_number,
        )
    except (ValueError, RecursionError) as error:
        raise _invalid(path, f"it is not valid JSON ({_first_line(error)})") from error
    if not isinstance(table, dict):
        raise _invalid(path, f"it is a JSON {type(table).__name__}, not an object")
    return table


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"{twice[:200]!r} appears twice")
    return table


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _whole_number(digits: str) -> int:
    if digits.startswith("-") or len(digits) > 20:
        raise ValueError(f"the number {digits[:24]} is negative or too large")
    return int(digits)


def _check_metadata(metadata: Any, path: str) -> None:
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) and encodable(key) and encodable(value)
        for key, value in metadata.items()
    ):
        raise _invalid(path, "__metadata__ is not an object of strings")


def _entry(name: str, entry: Any, path: str, begin: int) -> TensorInfo:
    if not name or not encodable(name):
        raise _invalid(path, f"the tensor name {name!r} is empty or not valid Unicode")
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise _invalid(path, f"{_shown(name)} has not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _invalid(path, f"{_shown(name)} has the unknown dtype {str(dtype)[:40]!r}")
    if not _whole_numbers(shape):
        raise _invalid(path, f"the shape of {_shown(name)} is not a list of whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _invalid(path, f"the data_offsets of {_shown(name)} are not [begin, end]")
    start, stop = offsets
    if stop - start != _nbytes(name, dtype, shape, path):
        raise _invalid(
            path,
            f"{_shown(name)} has {stop - start} bytes, which does not fit its dtype {dtype} and "
            f"shape {str(shape)[:80]}",
        )
    return TensorInfo(name, path, dtype, tuple(shape), begin + start, begin + stop)


def _nbytes(name: str, dtype: str, shape: list[int], path: str) -> int:
    count = 1
    for extent in shape:
        count *= extent
        # The reference reader multiplies in 64 bits, and a shape like [2**40, 2**40, 0] is a lie.
        if count >= 1 << 60:
            raise _invalid(path, f"the shape of {_shown(name)} has more than 2^60 elements")
    bits = count * BITS[dtype]
    if bits % 8:
        raise _invalid(path, f"{_shown(name)}: {count} elements of {dtype} fill no whole bytes")
    return bits // 8


def _check_contiguous(tensors: list[TensorInfo], path: str, begin: int) -> None:
    position, before = begin, "the header"
    for tensor in tensors:
        if tensor.start != position:
            what = "overlaps" if tensor.start < position else "leaves a hole after"
            raise _invalid(
                path,
                f"{_shown(tensor.name)} {what} {before}: it begins at byte {tensor.start - begin} "
                f"of the data, not {position - begin}",
            )
        position, before = tensor.stop, _shown(tensor.name)


def _whole_numbers(value: Any) -> bool:
    # bool is a subclass of int in Python and none in JSON.
    return isinstance(value, list) and all(type(item) is int for item in value)


def encodable(text: str) -> bool:
    """Say whether a text can be written as UTF-8."""
    # A lone surrogate, "\ud800", passes Python's JSON reader and no other.
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _shown(name: str) -> str:
    return repr(name if len(name) <= 200 else f"{name[:200]}…")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def _invalid(path: str, what: str) -> HeaderInvalid:
    return HeaderInvalid(f"the header of {path} is invalid: {what}", hint=_REPAIR)
