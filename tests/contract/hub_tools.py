"""A tiny model on the test Hub, and conversions from repo to repo."""

from __future__ import annotations

import hashlib

from hub.state import Hub
from places import contents_of

from pissa_core.engine import convert
from pissa_core.ports import CheckpointSink, CheckpointSource
from pissa_core.runtime import Runtime
from pissa_core.spec import parse_config

IN, OUT = "someone/llama", "somebody/out"

PROBE = 16 << 10
"""What planning reads of a shard for its header."""


def run(source: CheckpointSource, sink: CheckpointSink, **config: object) -> str:
    asked = parse_config({"rank": 2, **config})
    for _ in convert(source, sink, asked, Runtime(device="cpu", slots=1)):
        pass
    return sink.ref


def shown(hub: Hub, branch: str = "main") -> dict[str, str]:
    """Checksums of what the output shows."""
    contents = contents_of(hub, OUT, branch)
    return {path: hashlib.sha256(content).hexdigest() for path, content in contents.items()}


def shards_of(source: CheckpointSource) -> list[str]:
    return [path for path in source.files() if path.endswith(".safetensors")]
