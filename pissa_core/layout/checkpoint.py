"""One checkpoint: which files are its weights, found as transformers finds them.

Only headers are read, by ranged reads; every error a checkpoint's files can have, except a bad
number in a weight, is found here.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from pissa_core.errors import (
    HeaderInvalid,
    IndexMissingShard,
    NoSafetensors,
    QuantizedCheckpoint,
    UnsafePath,
)
from pissa_core.layout.header import Shard, TensorInfo, encodable, read_header
from pissa_core.layout.jsonfile import LARGEST_CONFIG, LARGEST_INDEX, read_object
from pissa_core.layout.sidefiles import CARD, OWN_NAMES, is_other_weights, sort_out
from pissa_core.ports import CheckpointSource

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"

_READERS = 8  # headers read at a time; a Hub answers each in a tenth of a second
_INDEX_HINT = "download the checkpoint again, or save it again with save_pretrained"
_QUANTIZED_KEYS = ("quantization_config", "compression_config")
_QUANTIZED_SUFFIXES = (
    ".qweight",
    ".weight_scale_inv",
    ".weight_packed",
    ".SCB",
    ".absmax",
    "_proj_blocks",
)


@dataclass(frozen=True)
class Layout:
    """What a checkpoint is made of.

    Attributes:
        config: the content of config.json.
        shards: the files of weights, sorted by path.
        index: the path of the index that names them; None for a single file.
        side_files: what goes along unchanged: config, tokenizer, code, sorted.
        left_out: what does not, such as weights in other formats, sorted.
        card: the path of the source's README, which goes into neither; None if it has none.
    """

    config: Mapping[str, Any]
    shards: tuple[Shard, ...]
    index: str | None
    side_files: tuple[str, ...]
    left_out: tuple[str, ...]
    card: str | None

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, shard by shard in the order of offsets."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}


def read_layout(source: CheckpointSource) -> Layout:
    """Find out what `source` holds and check that it is whole, reading headers only.

    Raises:
        NoSafetensors, IndexMissingShard, ShardTruncated, HeaderInvalid, UnsafePath,
        QuantizedCheckpoint: each naming the file.
    """
    files = source.files()
    for path in files:
        _check_path(path, "a file of the checkpoint")
        _check_spelling(path)
    config = _read_config(source)
    weights = _find_weights(source, config)
    if config is None:
        raise HeaderInvalid(
            f"{source.ref} has weights but no {CONFIG}, so what model they belong to is unknown",
            hint="save the model with save_pretrained, which writes both",
        )
    _refuse_quantized(source.ref, config)
    index = weights if weights.endswith(_INDEX_SUFFIX) else None
    weight_map = _read_index(source, index) if index else None
    shards = _read_shards(source, sorted(set(weight_map.values())) if weight_map else [weights])
    _refuse_quantized_tensors(shards)
    _check_names(shards, weight_map, index)
    taken = {*(shard.path for shard in shards), *([index] if index else [])}
    side_files, left_out = sort_out(source, taken)
    card = CARD if CARD in files else None
    return Layout(config, shards, index, side_files, left_out, card)


def _read_config(source: CheckpointSource) -> dict[str, Any] | None:
    if CONFIG not in source.files():
        return None
    return read_object(source, CONFIG, LARGEST_CONFIG)


def _find_weights(source: CheckpointSource, config: Mapping[str, Any] | None) -> str:
    """Choose the file transformers would: the one config.json names, the single one, the index."""
    files = source.files()
    named = (config or {}).get("transformers_weights")
    if named is not None:
        _check_named_weights(named)
        if named in files:
            return str(named)
        raise NoSafetensors(
            f"{CONFIG} of {source.ref} says that the weights are in {named!r}, which is not there",
            hint=_found_instead(source),
        )
    for candidate in (SINGLE, INDEX):
        if candidate in files:
            return candidate
    raise NoSafetensors(
        f"{source.ref} has neither {SINGLE} nor {INDEX}; it holds {_listing(source)}",
        hint=_found_instead(source),
    )


def _check_named_weights(named: Any) -> None:
    if not isinstance(named, str) or not named.endswith((_SUFFIX, _INDEX_SUFFIX)):
        raise HeaderInvalid(
            f"{CONFIG}: transformers_weights is {str(named)[:200]!r}, which names neither a "
            "safetensors file nor its index"
        )
    _check_named_path(named, f"transformers_weights in {CONFIG}")


def _listing(source: CheckpointSource) -> str:
    paths = sorted(source.files(), key=lambda path: (not _is_weights(path), path))
    if not paths:
        return "no files at all"
    more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
    return ", ".join(path[:100] for path in paths[:5]) + more


def _found_instead(source: CheckpointSource) -> str:
    files = source.files()
    if "adapter_config.json" in files:
        return "this is an adapter; give the base model it was made for"
    inside = sorted(path for path in files if PurePosixPath(path).name in (SINGLE, INDEX))
    if inside:
        folder = PurePosixPath(inside[0]).parent
        return f"the weights are in the subfolder {folder}; name it in the reference"
    if any(is_other_weights(path) for path in files):
        return (
            "convert the weights first: load the model with transformers and save it with "
            "save_pretrained, which writes safetensors"
        )
    if any(path.endswith(_SUFFIX) for path in files):
        return f"transformers loads {SINGLE} or {INDEX} only; rename or convert the file"
    return "name a model saved with save_pretrained"


def _is_weights(path: str) -> bool:
    return is_other_weights(path) or path.endswith(_SUFFIX)


def _read_index(source: CheckpointSource, index: str) -> dict[str, str]:
    content = read_object(source, index, LARGEST_INDEX)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise HeaderInvalid(f"{index} has no weight_map, or an empty one", hint=_INDEX_HINT)
    for name, path in weight_map.items():
        if not isinstance(path, str):
            raise HeaderInvalid(
                f"{index}: weight_map gives {name[:200]!r} the file {str(path)[:80]}, which is "
                "not a string",
                hint=_INDEX_HINT,
            )
    for path in sorted(set(weight_map.values())):
        _check_shard(source, path, index)
    return weight_map


def _check_shard(source: CheckpointSource, path: str, index: str) -> None:
    _check_named_path(path, f"weight_map in {index}")
    if not path.endswith(_SUFFIX) or PurePosixPath(path).parts[0] in OWN_NAMES:
        raise UnsafePath(
            f"weight_map in {index} names {path[:200]!r}, which is not the name of a shard "
            f"(*{_SUFFIX}, outside {', '.join(OWN_NAMES)})"
        )
    if path not in source.files():
        raise IndexMissingShard(
            f"{index} names the shard {path[:200]!r}, which is not in {source.ref}",
            hint=_INDEX_HINT,
        )


def _read_shards(source: CheckpointSource, paths: list[str]) -> tuple[Shard, ...]:
    files = source.files()
    with ThreadPoolExecutor(_READERS, thread_name_prefix="header") as readers:
        return tuple(readers.map(lambda path: read_header(source, path, files[path].size), paths))


def _check_names(
    shards: tuple[Shard, ...], weight_map: Mapping[str, str] | None, index: str | None
) -> None:
    """Check that every tensor is in one shard, and in the one the index names."""
    found: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in found:
                raise HeaderInvalid(
                    f"the tensor {tensor.name[:200]!r} is in two shards, {found[tensor.name]} and "
                    f"{shard.path}",
                    hint=_INDEX_HINT,
                )
            found[tensor.name] = shard.path
    for name, path in (weight_map or {}).items():
        if found.get(name) != path:
            raise IndexMissingShard(
                f"{index} says that the tensor {name[:200]!r} is in {path}, whose header does not "
                "have it",
                hint=_INDEX_HINT,
            )


def _refuse_quantized(ref: str, config: Mapping[str, Any]) -> None:
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in _QUANTIZED_KEYS:
            value = part.get(key)
            if value:
                method = value.get("quant_method") if isinstance(value, dict) else None
                raise QuantizedCheckpoint(
                    f"{ref} is quantised: its {CONFIG} has a {key}"
                    + (f" ({str(method)[:40]})" if method else ""),
                    hint="PiSSA splits full-precision weights; name the model this was made from",
                )


def _refuse_quantized_tensors(shards: tuple[Shard, ...]) -> None:
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name.endswith(_QUANTIZED_SUFFIXES):
                raise QuantizedCheckpoint(
                    f"{shard.path} holds {tensor.name[:200]!r}, which only quantised checkpoints "
                    "have",
                    hint="PiSSA splits full-precision weights; name the model this was made from",
                )


def _check_named_path(path: str, where: str) -> None:
    """Check a path that a file names: no backslash either, which separates on Windows."""
    _check_path(path, where, forbidden="\0\\")


def _check_spelling(path: str) -> None:
    """Refuse a name whose bytes are no text: no manifest, answer or terminal could show it."""
    if not encodable(path):
        raise UnsafePath(
            f"the checkpoint has a file whose name is not valid Unicode, {path[:200]!r}",
            hint="rename the file, or remove it if it is no part of the model",
        )


def _check_path(path: str, where: str, *, forbidden: str = "\0") -> None:
    """Refuse a name that would lead out of the checkpoint's folder."""
    if {"", ".", ".."} & set(path.split("/")) or any(char in path for char in forbidden):
        raise UnsafePath(
            f"{where} names {path[:200]!r}, which points outside the checkpoint's folder",
            hint="only relative paths below the folder are followed; download the model again",
        )
