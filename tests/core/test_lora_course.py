"""How a conversion goes: what it reads, in what order, interrupted, and always the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conversions import checksums
from lora_tools import made_adapter, to_lora

from pissa_core.adapters import open_sink, open_source
from pissa_core.adapters.memory import MemorySink, MemorySource
from pissa_core.errors import DiskTooSmall
from pissa_core.events import MatrixDone, ShardSealed
from pissa_core.lora.conversion import convert_adapter
from pissa_core.lora.plan import LoraPlan
from pissa_core.lora.planning import Found, check_lora_plan, make_lora_plan, open_adapters
from pissa_core.refs import LocalRef
from pissa_core.runtime import Runtime
from pissa_core.spec import LoraOptions

SHAPES = {f"layers.{layer}.{name}": (40, 48) for layer in range(6) for name in ("q", "v")}
RUNTIME = Runtime(device="cpu", slots=1)


@pytest.fixture
def adapters(tmp_path) -> tuple[Path, Path]:
    trained = made_adapter(tmp_path / "trained", SHAPES, seed=1)
    return trained, made_adapter(tmp_path / "initial", SHAPES, seed=0)


class Watched(MemorySource):
    """A source that counts what is read of its weights."""

    reads: list[tuple[int, int]]

    def __init__(self, folder: Path) -> None:
        super().__init__({path.name: path.read_bytes() for path in folder.iterdir()})
        self.reads = []

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        if path.endswith(".safetensors"):
            self.reads.append((start, start + len(buffer)))
        super().read_into(path, start, buffer)


def found_in(adapters: tuple[Path, Path]) -> Found:
    trained, initial = (LocalRef(str(path)) for path in adapters)
    return open_adapters(trained, initial, open_source)


def test_every_factor_is_read_once_and_nothing_larger(adapters):
    trained, initial = (Watched(path) for path in adapters)
    found = Found(trained, LocalRef(str(adapters[1])), initial)
    plan = make_lora_plan(found, LoraOptions(), open_source)
    sink = MemorySink()
    list(convert_adapter(plan, trained, initial, sink, RUNTIME))
    assert set(sink.contents) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "pissa_manifest.json",
    }  # fmt: skip
    for source, which in ((trained, "trained"), (initial, "initial")):
        pairs = [getattr(update, which) for update in plan.updates]
        tensors = {(t.start, t.stop) for pair in pairs for t in (pair.a, pair.b)}
        assert len(source.reads) == len(tensors) == 2 * len(SHAPES)
        assert set(source.reads) == tensors


def test_a_plan_survives_the_store(adapters):
    plan = make_lora_plan(found_in(adapters), LoraOptions(rank=3), open_source)
    assert LoraPlan.from_json(plan.to_json()) == plan
    with pytest.raises(ValueError, match="another version"):
        LoraPlan.from_json('{"schema": 0}')


@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"tolerance": 0.2, "uniform": True}])
def test_the_bytes_depend_on_neither_slots_nor_order(adapters, tmp_path, options):
    to_lora(adapters[0], tmp_path / "one", adapters[1], slots=1, **options)
    to_lora(adapters[0], tmp_path / "many", adapters[1], slots=4, **options)
    assert checksums(tmp_path / "one") == checksums(tmp_path / "many")


def course(adapters: tuple[Path, Path], out: Path) -> Iterator[object]:
    found = found_in(adapters)
    plan = make_lora_plan(found, LoraOptions(rank=5), open_source)
    sink = open_sink(LocalRef(str(out)), digest="d1")
    yield from convert_adapter(plan, found.trained, found.initial, sink, RUNTIME)


def test_left_between_two_matrices_it_shows_nothing_and_goes_through_again(adapters, tmp_path):
    out = tmp_path / "out"
    events = course(adapters, out)
    assert isinstance(next(event for event in events if isinstance(event, MatrixDone)), MatrixDone)
    events.close()
    assert not out.exists()
    list(course(adapters, out))
    to_lora(adapters[0], tmp_path / "alone", adapters[1], rank=5)
    assert checksums(out) == checksums(tmp_path / "alone")
    assert [path.name for path in tmp_path.iterdir() if "staging" in path.name] == []


def test_what_is_sealed_is_not_made_again(adapters, tmp_path):
    events = course(adapters, tmp_path / "out")
    next(event for event in events if isinstance(event, ShardSealed))
    events.close()
    again = list(course(adapters, tmp_path / "out"))
    assert not any(isinstance(event, MatrixDone) for event in again)
    assert [event.resumed for event in again if isinstance(event, ShardSealed)] == [True]
    list(course(adapters, tmp_path / "out"))  # and a third time there is nothing to do


def test_a_disk_that_is_too_small_is_found_before_the_work(adapters):
    found = found_in(adapters)
    plan = make_lora_plan(found, LoraOptions(), open_source)

    class Small(MemorySink):
        def free_bytes(self) -> int:  # type: ignore[override]
            return 1000

    with pytest.raises(DiskTooSmall, match=r"needs [\d,]+ bytes of disk and 1,000 are free"):
        check_lora_plan(plan, found, Small(), Runtime())
