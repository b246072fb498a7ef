"""A JSON object in somebody's checkpoint, read in bounded memory."""

from __future__ import annotations

import json
from typing import Any

from pissa_core.errors import HeaderInvalid
from pissa_core.ports import CheckpointSource

LARGEST_CONFIG = 16 << 20
LARGEST_INDEX = LARGEST_MANIFEST = 256 << 20
"""Bytes. Of the largest models there are, with an entry an expert, each takes half as much."""

MOST_VALUES = 4_000_000
MOST_IN_A_MANIFEST = 16_000_000
"""Values. An empty list of three bytes takes 70 in memory."""


def read_object(
    source: CheckpointSource, path: str, largest: int, *, most: int = MOST_VALUES
) -> dict[str, Any]:
    """Read a file of at most `largest` bytes that holds an object of at most `most` values.

    Raises:
        HeaderInvalid: if it is larger, or no JSON object.
    """
    return parse_object(read_bounded(source, path, largest, most=most), f"{path} of {source.ref}")


def read_bounded(
    source: CheckpointSource, path: str, largest: int, *, most: int = MOST_VALUES
) -> bytes:
    """Read a file of JSON that may be parsed without fear for memory.

    Raises:
        HeaderInvalid: if it is larger, or holds more values.
    """
    name, size = f"{path} of {source.ref}", source.files()[path].size
    if size > largest:
        raise HeaderInvalid(f"{name} holds {size} bytes; at most {largest} are read")
    content = source.read(path)
    if sum(map(content.count, (b",", b"[", b"{"))) > most:
        raise HeaderInvalid(f"{name} has more than {most} values")
    return content


def parse_object(content: bytes, name: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        HeaderInvalid: naming the file as `name`.
    """
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise HeaderInvalid(
            f"{name} is not valid JSON ({str(error)[:200]})", hint="download or save it again"
        ) from error
    if not isinstance(value, dict):
        raise HeaderInvalid(f"{name} holds a JSON {type(value).__name__}, not an object")
    return value
