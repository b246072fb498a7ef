"""An adapter as stock PEFT saves it, read from headers: its config, its tensors, its checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pissa_core.errors import UnsupportedAdapter
from pissa_core.layout import TensorInfo, read_header
from pissa_core.layout.jsonfile import LARGEST_CONFIG, read_object
from pissa_core.openfile import CHUNK
from pissa_core.ports import CheckpointSource

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

DECOMPOSES = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How the values of `init_lora_weights` begin that make PEFT change the base when it loads."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter in a folder of its own; its weights stay where they are until asked for."""

    source: CheckpointSource
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    weights: str = WEIGHTS

    def chunks(self, key: str) -> Iterator[bytes]:
        """Yield the bytes of one tensor, piece by piece."""
        tensor = self.tensors[key]
        for start in range(tensor.start, tensor.stop, CHUNK):
            yield self.source.read(self.weights, start, min(start + CHUNK, tensor.stop))


def read_adapter(source: CheckpointSource, folder: str = "") -> Adapter:
    """Read config and header of the adapter at the root of `source`, or in a folder of it.

    Raises:
        UnsupportedAdapter: if there is none, or not one that is stored as LoRA in safetensors.
        HeaderInvalid, ShardTruncated: if one of its files is damaged.
    """
    files = source.files()
    config_path, weights = (f"{folder}/{name}" if folder else name for name in (CONFIG, WEIGHTS))
    if config_path not in files:
        raise UnsupportedAdapter(
            f"{source.ref} holds no adapter: it has no {config_path}", hint=_found_instead(files)
        )
    config = read_object(source, config_path, LARGEST_CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedAdapter(
            f"{source.ref} is an adapter of type {str(kind)[:40]!r}; only LORA is understood"
        )
    if weights not in files:
        raise UnsupportedAdapter(
            f"{source.ref} has no {weights}",
            hint="save it again with a recent PEFT: save_pretrained writes safetensors",
        )
    header = read_header(source, weights, files[weights].size)
    return Adapter(source, config, {tensor.name: tensor for tensor in header.tensors}, weights)


def adapter_size(source: CheckpointSource, folder: str = "") -> int:
    """Return the bytes of an adapter's weights; 0 if there are none."""
    info = source.files().get(f"{folder}/{WEIGHTS}" if folder else WEIGHTS)
    return 0 if info is None else info.size


def checksum(source: CheckpointSource, path: str) -> str:
    """Return the sha256 of a file: the source's own word if it has one, else by reading it all."""
    info = source.files()[path]
    if info.sha256 is not None:
        return info.sha256
    digest = hashlib.sha256()
    for start in range(0, info.size, CHUNK):
        digest.update(source.read(path, start, min(start + CHUNK, info.size)))
    return digest.hexdigest()


def decomposes(config: Mapping[str, Any]) -> bool:
    """Whether PEFT, loading an adapter with this config, would decompose the base once more."""
    init = config.get("init_lora_weights")
    return isinstance(init, str) and init.lower().startswith(DECOMPOSES)


def _found_instead(files: Mapping[str, object]) -> str:
    inside = sorted(path.rpartition("/")[0] for path in files if path.endswith(f"/{CONFIG}"))
    if inside:
        return f"there is one in the subfolder {inside[0]}; name it in the reference"
    return "name the folder that PEFT's save_pretrained has written"
