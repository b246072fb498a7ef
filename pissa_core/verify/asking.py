"""From two checkpoints to a case: headers, configs and the manifest read, PEFT asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pissa_core.errors import HeaderInvalid, PissaError
from pissa_core.fold.adapter import Adapter, decomposes, read_adapter
from pissa_core.layout import Layout, read_layout
from pissa_core.layout.jsonfile import (
    LARGEST_MANIFEST,
    MOST_IN_A_MANIFEST,
    parse_object,
    read_bounded,
)
from pissa_core.layout.sidefiles import CARD, INITIAL, MANIFEST, OWN_NAMES
from pissa_core.plan import CarriedTensor, Matrix, Piece
from pissa_core.ports import CheckpointSource
from pissa_core.report.manifest import canonical_json
from pissa_core.spec import parse_config
from pissa_core.verify.case import OTHERS, Case, Fault, Unit, of_a_tool
from pissa_core.verify.claims import row_faults, shape_faults, total_faults
from pissa_core.verify.examine import ADAPTER

CONFIG = f"{INITIAL}/adapter_config.json"
_OURS = {
    MANIFEST,
    CONFIG,
    ADAPTER,
    "README.md",
    "pissa_report/spectra.svg",
    "pissa_report/energy.svg",
}


@dataclass(slots=True)
class _Findings:
    """What is collected while a case is made."""

    faults: list[Fault] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, check: str, where: str, what: str) -> None:
        self.faults.append(Fault(check, where, what))


def make_case(original: CheckpointSource, converted: CheckpointSource) -> Case:
    """Find out from headers what is to be compared with what, and what is wrong already.

    Raises:
        PissaError: the original is not what it should be. What is wrong with the converted model
            is no error but a fault of the case.
    """
    layout = read_layout(original)
    found = _Findings()
    manifest = _read_manifest(converted, found)
    theirs = _read_converted(converted, found)
    adapter = _read_pair(converted, found)
    matrices, carried = _resolve(layout, theirs, adapter, found)
    _check_config(layout, manifest, adapter, found)
    _check_source(manifest, original, found)
    if theirs is not None:
        _check_tensors(layout, theirs, found)
    _check_side_files(layout, theirs, converted, found)
    if manifest:
        found.faults += shape_faults(manifest)
        if matrices:
            found.faults += row_faults(manifest, matrices)
            found.faults += total_faults(manifest, matrices, carried)
    return Case(
        source=original.ref,
        commit=original.commit,
        converted=converted.ref,
        converted_commit=converted.commit,
        units=_units(converted, theirs),
        matrices=matrices,
        pieces=_pieces(adapter, matrices, carried),
        carried=carried,
        side_files=_side_files(layout, theirs),
        manifest=manifest,
        faults=tuple(dict.fromkeys(found.faults)),
        unchecked=tuple(found.unchecked),
        notes=tuple(found.notes),
    )


def model_size(converted: CheckpointSource) -> int:
    """Return the bytes of a converted model's files, but for what the conversion added."""
    return sum(
        info.size
        for path, info in converted.files().items()
        if path.partition("/")[0] not in (*OWN_NAMES, CARD) and not of_a_tool(path)
    )


def _read_manifest(converted: CheckpointSource, found: _Findings) -> dict[str, Any]:
    if MANIFEST not in converted.files():
        found.note("manifest", MANIFEST, "it is missing")
        return {}
    try:
        content = read_bounded(converted, MANIFEST, LARGEST_MANIFEST, most=MOST_IN_A_MANIFEST)
        manifest = parse_object(content, MANIFEST)
        as_written = canonical_json(manifest) == content
    except (HeaderInvalid, ValueError) as error:
        found.note("manifest", MANIFEST, str(error)[:300])
        return {}
    if not as_written:
        found.note("manifest", MANIFEST, "its bytes are not as this project writes them")
    return manifest


def _read_converted(converted: CheckpointSource, found: _Findings) -> Layout | None:
    try:
        return read_layout(converted)
    except PissaError as error:
        if error.retryable:
            raise
        found.note("tensors", converted.ref, error.message)
        found.unchecked.append("the weights, since the converted model is no checkpoint any more")
        return None


def _read_pair(converted: CheckpointSource, found: _Findings) -> Adapter | None:
    try:
        adapter = read_adapter(converted, INITIAL)
    except PissaError as error:
        if error.retryable:
            raise
        found.note("adapter", INITIAL, error.message)
        return None
    init = adapter.config.get("init_lora_weights")
    if decomposes(adapter.config):
        found.note(
            "adapter",
            CONFIG,
            f"init_lora_weights is {init!r}: PEFT would decompose the residual once more",
        )
    elif init is not True:
        found.note("adapter", CONFIG, f"init_lora_weights is {init!r}, and it must be true")
    return adapter


def _resolve(
    layout: Layout, theirs: Layout | None, adapter: Adapter | None, found: _Findings
) -> tuple[tuple[Matrix, ...], tuple[CarriedTensor, ...]]:
    """Ask PEFT which tensors the adapter completes; return them where the residuals lie."""
    from pissa_core.targets.adapted import resolve_adapter

    if adapter is None:
        found.unchecked.append("the targets, since there is no adapter to recombine them with")
        return (), ()
    held = {key: tensor.shape for key, tensor in adapter.tensors.items()}
    try:
        adapted = resolve_adapter(layout, adapter.config, held)
    except PissaError as error:
        found.note("adapter", ADAPTER, error.message)
        found.unchecked.append("the targets, since the adapter does not fit the original")
        return (), ()
    for refusal in adapted.refused:
        found.note("adapter", refusal.name, refusal.reason)
    for copy in adapted.copies:
        found.note("adapter", copy.key, "the adapter stores the weight of a target, too")
    if theirs is None:
        return (), adapted.replaced
    return tuple(_moved(m, theirs) for m in adapted.matrices if _same(m, theirs)), adapted.replaced


def _same(matrix: Matrix, theirs: Layout) -> bool:
    # A tensor that is missing or of another shape is a fault of its own.
    tensor = theirs.tensors.get(matrix.tensor)
    return tensor is not None and (tensor.dtype, tensor.shape) == (matrix.dtype, matrix.shape)


def _moved(matrix: Matrix, theirs: Layout) -> Matrix:
    tensor = theirs.tensors[matrix.tensor]
    return dataclasses.replace(matrix, shard=tensor.shard, start=tensor.start, stop=tensor.stop)


def _check_config(
    layout: Layout, manifest: Mapping[str, Any], adapter: Adapter | None, found: _Findings
) -> None:
    """Hold the manifest's config against the adapter's: PEFT would save the one for the other."""
    from pissa_core.targets import resolve_targets

    config = manifest.get("config")
    if not isinstance(config, dict):
        return
    try:
        accepted = parse_config(config)
        targets = resolve_targets(layout, accepted)
    except PissaError as error:
        found.note("manifest", "config", error.message)
        return
    if accepted.model_dump(mode="json") != config:
        found.note("manifest", "config", "it is not the whole config, every default filled in")
    if adapter is None:
        return
    wanted, saved = _comparable(targets.adapter_config), _comparable(adapter.config)
    for name in sorted(wanted.keys() | saved.keys()):
        if wanted.get(name) != saved.get(name):
            found.note(
                "adapter",
                CONFIG,
                f"{name} is {_short(saved.get(name))}, and the manifest's config gives "
                f"{_short(wanted.get(name))}",
            )
    spelled = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[accepted.adapter_dtype]
    factors = {t.dtype for key, t in adapter.tensors.items() if ".lora_" in key}
    if factors != {spelled}:
        dtypes = ", ".join(sorted(factors))
        found.note("adapter", ADAPTER, f"its factors are {dtypes}, the config says {spelled}")


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    # Where it lies, and which PEFT wrote it, may differ; a set has no order.
    left_out = ("base_model_name_or_path", "revision", "peft_version")
    return {
        name: sorted(value) if name == "target_modules" and isinstance(value, list) else value
        for name, value in config.items()
        if name not in left_out
    }


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _check_source(
    manifest: Mapping[str, Any], original: CheckpointSource, found: _Findings
) -> None:
    source = manifest.get("source")
    if not manifest:
        return
    if not isinstance(source, dict) or not isinstance(source.get("ref"), str):
        found.note("manifest", "source", "it does not say what was converted")
        return
    ref, commit = source["ref"], source.get("commit")
    if ref == original.ref and commit == original.commit:
        return
    both_on_the_hub = ref.startswith("hf://") and original.commit is not None
    if both_on_the_hub or (commit is not None) != ref.startswith("hf://"):
        found.note(
            "manifest", "source", f"it says {ref} ({commit}), and the original is {original.ref}"
        )
    else:
        found.notes.append(
            f"the manifest names {ref} as its source; whether {original.ref} is the same, it does "
            "not say"
        )


def _check_tensors(layout: Layout, theirs: Layout, found: _Findings) -> None:
    for name in sorted(layout.tensors.keys() - theirs.tensors.keys()):
        found.note("tensors", name, "the original has it, and the converted model has not")
    for name in sorted(theirs.tensors.keys() - layout.tensors.keys()):
        found.note("tensors", name, "the converted model has it, and the original has not")
    for name in layout.tensors.keys() & theirs.tensors.keys():
        mine, other = theirs.tensors[name], layout.tensors[name]
        if (mine.dtype, mine.shape) != (other.dtype, other.shape):
            found.note(
                "tensors",
                name,
                f"it is {mine.dtype} {list(mine.shape)}, in the original {other.dtype} "
                f"{list(other.shape)}",
            )


def _side_files(layout: Layout, theirs: Layout | None) -> tuple[str, ...]:
    """Return the files that must be the original's; of divided shards the index is not."""
    same = theirs is not None and [s.path for s in theirs.shards] == [s.path for s in layout.shards]
    index = (layout.index,) if layout.index is not None and same else ()
    return (*index, *layout.side_files)


def _check_side_files(
    layout: Layout, theirs: Layout | None, converted: CheckpointSource, found: _Findings
) -> None:
    there = set(converted.files())
    for path in (*layout.side_files, *_OURS):
        if path not in there and path != MANIFEST:
            found.note("files", path, "it is missing")
    if theirs is None:
        return
    known = {*layout.side_files, *_OURS, *(shard.path for shard in theirs.shards)}
    known |= {theirs.index} if theirs.index else set()
    for path in sorted(there - known):
        if not of_a_tool(path):
            found.note("files", path, "no conversion of the original has such a file")


def _units(converted: CheckpointSource, theirs: Layout | None) -> tuple[Unit, ...]:
    files = converted.files()
    shards = [shard.path for shard in theirs.shards] if theirs is not None else []
    heavy = [*shards, *([ADAPTER] if ADAPTER in files else [])]
    rest = sum(info.size for path, info in files.items() if not (path in heavy or of_a_tool(path)))
    return (*(Unit(path, files[path].size) for path in heavy), Unit(OTHERS, rest))


def _pieces(
    adapter: Adapter | None, matrices: tuple[Matrix, ...], carried: tuple[CarriedTensor, ...]
) -> dict[str, Piece]:
    keys = [key for matrix in matrices for key in (matrix.key_a, matrix.key_b)]
    keys += [tensor.key for tensor in carried]
    tensors = adapter.tensors if adapter is not None else {}
    return {key: Piece(t.dtype, t.shape, t.start, t.stop) for key in keys if (t := tensors[key])}
