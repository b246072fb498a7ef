"""What a checkpoint is: its config, its shards' headers, its index, and the files beside them."""

from pissa_core.layout.checkpoint import Layout, read_layout
from pissa_core.layout.header import (
    BITS,
    MAX_HEADER,
    MAX_TENSORS,
    Shard,
    TensorInfo,
    header_length,
    parse_header,
    read_header,
)

__all__ = [
    "BITS",
    "MAX_HEADER",
    "MAX_TENSORS",
    "Layout",
    "Shard",
    "TensorInfo",
    "header_length",
    "parse_header",
    "read_header",
    "read_layout",
]
