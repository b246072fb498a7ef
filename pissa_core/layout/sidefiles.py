"""Which files go along with a converted model, and which must not.

Left out: weights in other formats (they would be the unconverted model under the same roof),
safetensors that belong to no layout (a second precision, ``consolidated.safetensors``), adapters
for the original base (they do not fit the residual, and transformers loads them unasked), tool
folders, and what would collide with the files this project writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from pissa_core.ports import CheckpointSource

CARD = "README.md"
"""The model's card: merged into ours, so neither carried along nor left out."""

INITIAL = "pissa_init"
"""The folder of the initial adapter in a residual model."""

MANIFEST = "pissa_manifest.json"
"""What was done, and what came out, a row a matrix; of every kind of result."""

OWN_NAMES = (MANIFEST, INITIAL, "pissa_report", ".pissa-storage-id")
"""First path segments of what a conversion writes, and the service's mark in a local root."""

OTHER_FORMATS = (
    ".bin",
    ".ckpt",
    ".gguf",
    ".ggml",
    ".h5",
    ".llamafile",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".ot",
    ".pdparams",
    ".pt",
    ".pth",
    ".tflite",
)
_TOOL_FOLDERS = {".cache", ".git", "original", "__pycache__"}
_NOWHERE = {".cache", ".git"}  # the Hub client sends nothing of the name: a submodule's .git, say
_ADAPTERS = {"adapter_config.json", "adapter_model.safetensors"}
_WEIGHT_INDEX = tuple(f"{suffix}.index" for suffix in (*OTHER_FORMATS, ".safetensors"))
_MODULES = "modules.json"
_ROOT = str(PurePosixPath(""))  # where the model itself lies, so no module's own folder
_LARGEST_MODULES = 1 << 20
_LARGEST_CARD = 16 << 20


def read_card(source: CheckpointSource) -> str:
    """Return the source's card; nothing, if it has none or one that nobody would read."""
    info = source.files().get(CARD)
    if info is None or info.size > _LARGEST_CARD:
        return ""
    return source.read(CARD).decode(errors="replace")


def sort_out(
    source: CheckpointSource, taken: Iterable[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split what is neither weights nor index (`taken`) into files to carry along and to leave.

    Both are sorted. The card is in neither.
    """
    files = source.files()
    rest = sorted(set(files) - set(taken) - {CARD})
    modules = _module_folders(source, files)
    left = tuple(path for path in rest if not _goes_along(path, modules))
    return tuple(sorted(set(rest) - set(left))), left


def is_other_weights(path: str) -> bool:
    """Say whether a file holds weights, or the index of weights, in a format other than ours."""
    name = PurePosixPath(path).name.lower()
    return name.endswith(OTHER_FORMATS) or any(f"{suffix}." in name for suffix in _WEIGHT_INDEX)


def _goes_along(path: str, modules: frozenset[str]) -> bool:
    parts = PurePosixPath(path).parts
    if parts[0] in OWN_NAMES or _TOOL_FOLDERS.intersection(parts[:-1]) or parts[0] in _TOOL_FOLDERS:
        return False
    if parts[-1] in _ADAPTERS | _NOWHERE:
        return False
    if str(PurePosixPath(path).parent) in modules:
        return True
    return not is_other_weights(path) and not parts[-1].lower().endswith(".safetensors")


def _module_folders(source: CheckpointSource, files: Mapping[str, object]) -> frozenset[str]:
    """Return the folders of further sentence-transformers modules (a dense head, say).

    Their weights are part of the pipeline around the model and no second copy of it. A
    ``modules.json`` that is none is carried along as it is, and names nothing.
    """
    info = source.files().get(_MODULES)
    if info is None or info.size > _LARGEST_MODULES:
        return frozenset()
    try:
        modules = json.loads(source.read(_MODULES))
        paths = [module["path"] for module in modules]
    except (ValueError, TypeError, KeyError, RecursionError):
        return frozenset()
    folders = {str(PurePosixPath(path)) for path in paths if isinstance(path, str)}
    return frozenset(folders - {_ROOT})
