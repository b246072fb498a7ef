"""Where each tensor of the result lies in its file, and the file cut down where ranks shrank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from pissa_core.layout.header import TensorInfo
from pissa_core.lora.adapter import WEIGHTS
from pissa_core.lora.form import form_of
from pissa_core.lora.plan import LoraPlan, Update
from pissa_core.lora.updates import pad_columns, pad_rows
from pissa_core.openfile import CHUNK
from pissa_core.ports import CheckpointSource
from pissa_core.tensorfile import (
    TORCH_DTYPES,
    Entry,
    Header,
    PatchFile,
    empty,
    make_header,
    memory_of,
)
from pissa_core.workbench import JOURNAL_BYTES


def bound_entries(plan: LoraPlan) -> list[Entry]:
    """Return what the result holds when every module has the largest rank it may end with."""
    form = form_of(plan)
    return entries(plan, {each.module: form.width(plan, each) for each in plan.updates})


def scratch_bytes(plan: LoraPlan, adapters: Iterable[CheckpointSource]) -> int:
    """Return the bytes of disk that making the file of weights takes.

    It is laid out at the largest ranks, and written once more where a tolerance makes them
    smaller; beside it lie the weights of adapters that are not in a folder here.
    """
    laid_out = make_header(bound_entries(plan)).file_size
    fetched = (each.files()[WEIGHTS].size for each in adapters if not each.rereads)
    return laid_out * (1 if plan.options.tolerance is None else 2) + sum(fetched) + JOURNAL_BYTES


def entries(plan: LoraPlan, ranks: Mapping[str, int]) -> list[Entry]:
    """Return what the result holds: wide dtypes first, so that all data is aligned; then by key."""
    found = [_carried_entry(tensor) for tensor in plan.carried]
    for update in plan.updates:
        found += _factor_entries(plan, update, ranks[update.module])
    width = {"F64": 8, "I64": 8, "F32": 4, "I32": 4}
    return sorted(found, key=lambda entry: (-width.get(entry.dtype, 2), entry.name))


def shrink(
    plan: LoraPlan, laid_out: PatchFile, wide: Header, ranks: Mapping[str, int], kept: int | None
) -> Iterator[bytes]:
    """Yield the result's file from one that was laid out at the largest ranks.

    Args:
        plan: what is done.
        laid_out: each factor begins where `wide` says and is as long as its own rank needs.
        wide: the header of the larger file.
        ranks: module → the rank its factors have there.
        kept: with a number, every module is padded to that rank.
    """
    final = {module: rank if kept is None else kept for module, rank in ranks.items()}
    ordered = entries(plan, final)
    yield make_header(ordered).encoded
    updates = {key: each for each in plan.updates for key in _keys(each)}
    for entry in ordered:
        update, start = updates.get(entry.name), wide.starts[entry.name]
        if update is None or ranks[update.module] == final[update.module]:
            yield from _range(laid_out, start, entry.nbytes)
        else:
            yield _padded(laid_out, start, entry, update, ranks[update.module])


def _padded(file: PatchFile, start: int, entry: Entry, update: Update, rank: int) -> bytes:
    m, n = update.trained.shape
    is_a = entry.name == update.trained.a.name
    values, buffer = empty((rank, n) if is_a else (m, rank), entry.dtype)
    file.read_into(start, buffer)
    padded = pad_rows(values, entry.shape[0]) if is_a else pad_columns(values, entry.shape[1])
    return bytes(memory_of(padded))


def _range(file: PatchFile, start: int, nbytes: int) -> Iterator[bytes]:
    for begin in range(0, nbytes, CHUNK):
        buffer = bytearray(min(CHUNK, nbytes - begin))
        file.read_into(start + begin, memoryview(buffer))
        yield bytes(buffer)


def _factor_entries(plan: LoraPlan, update: Update, rank: int) -> Iterator[Entry]:
    m, n = update.trained.shape
    dtype = form_of(plan).dtype(update)
    itemsize = TORCH_DTYPES[dtype].itemsize
    yield Entry(update.trained.a.name, dtype, (rank, n), rank * n * itemsize)
    yield Entry(update.trained.b.name, dtype, (m, rank), m * rank * itemsize)


def _carried_entry(tensor: TensorInfo) -> Entry:
    return Entry(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes)


def _keys(update: Update) -> tuple[str, str]:
    return update.trained.a.name, update.trained.b.name
