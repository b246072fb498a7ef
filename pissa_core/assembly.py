"""What a result holds besides its shards: the adapter in one file, its config, the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pissa_core import report
from pissa_core.layout.sidefiles import INITIAL, MANIFEST, read_card
from pissa_core.openfile import CHUNK
from pissa_core.plan import Plan
from pissa_core.ports import CheckpointSink, CheckpointSource, FileInfo, Publication, Seal
from pissa_core.tensorfile import Header, concatenate, make_header
from pissa_core.workbench import part_entries

ADAPTER = f"{INITIAL}/adapter_model.safetensors"
ADAPTER_CONFIG = f"{INITIAL}/adapter_config.json"


@dataclass(frozen=True, slots=True)
class _Closing:
    """Writes the last files, which state the checksums of all others."""

    plan: Plan
    rows: tuple[Mapping[str, Any], ...]
    source: CheckpointSource
    sink: CheckpointSink

    def __call__(self, files: Mapping[str, FileInfo]) -> dict[str, bytes]:
        readme = report.card(
            self.plan,
            self.rows,
            base_model_name_or_path=self.sink.base_model_name_or_path,
            source_card=read_card(self.source),
            revision=self.sink.revision,
        )
        listed = {**files, "README.md": _info_of(readme)}
        return {"README.md": readme, MANIFEST: report.manifest(self.plan, self.rows, listed)}


def publication(
    plan: Plan, source: CheckpointSource, sink: CheckpointSink, seals: tuple[Seal, ...]
) -> Publication:
    """Say what becomes visible: sealed shards, files copied, files made now, files made last."""
    rows = tuple(row for seal in seals for row in seal.rows)
    fixed = {ADAPTER_CONFIG: _adapter_config(plan, sink), **report.pictures(plan, rows)}
    if plan.index is not None and plan.new_index is not None:
        fixed[plan.index] = plan.new_index.encode()
    streams: dict[str, Callable[[], Iterable[bytes]]] = {
        path: partial(lambda content: [content], content) for path, content in fixed.items()
    }
    streams[ADAPTER] = partial(_assemble, plan, sink)
    return Publication(
        source=source,
        shards=seals,
        copies=plan.copied,
        streams=streams,
        closing=_Closing(plan, rows, source, sink),
        marker=MANIFEST,
    )


def _assemble(plan: Plan, sink: CheckpointSink) -> Iterator[bytes]:
    """Yield the adapter's one file: a header over all parts, then the parts' bodies in turn."""
    entries = {shard.path: part_entries(plan, shard) for shard in plan.shards}
    whole = make_header([entry for part in entries.values() for entry in part])
    bodies = (_body(sink, path, make_header(part)) for path, part in entries.items())
    return concatenate(whole, bodies)


def _body(sink: CheckpointSink, shard: str, header: Header) -> Iterator[bytes]:
    for start in range(len(header.encoded), header.file_size, CHUNK):
        yield sink.read_part(shard, start, min(start + CHUNK, header.file_size))


def _adapter_config(plan: Plan, sink: CheckpointSink) -> bytes:
    content = {
        **plan.adapter_config,
        "base_model_name_or_path": sink.base_model_name_or_path,
        "revision": sink.revision,
    }
    return json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"


def _info_of(content: bytes) -> FileInfo:
    """Return size and sha256 of bytes."""
    return FileInfo(len(content), hashlib.sha256(content).hexdigest())
