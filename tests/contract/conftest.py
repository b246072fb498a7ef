"""The adapters that one contract suite holds to the same promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
from hub.state import Hub
from hub_tools import OUT
from machines import Machine
from places import CONTENTS, HubPlace, LocalPlace, MemoryPlace, Place

from pissa_core.adapters.hub import HubSink
from pissa_core.adapters.local import LocalSource
from pissa_core.adapters.memory import MemorySource
from pissa_core.ports import CheckpointSource

MakeSource = Callable[[Mapping[str, bytes]], CheckpointSource]


@pytest.fixture(params=["memory", "local", "hub"])
def make_source(request: pytest.FixtureRequest, tmp_path: Path) -> MakeSource:
    """Return a function that opens a source with the given files."""
    if request.param == "memory":
        return MemorySource
    if request.param == "hub":
        return _maker_on_the_hub(request)

    def make_local(contents: Mapping[str, bytes]) -> CheckpointSource:
        folder = tmp_path / "source"
        for path, content in contents.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return LocalSource(folder)

    return make_local


def _maker_on_the_hub(request: pytest.FixtureRequest) -> MakeSource:
    hub, open_hub = request.getfixturevalue("hub"), request.getfixturevalue("open_hub")

    def make_remote(contents: Mapping[str, bytes]) -> CheckpointSource:
        hub.create_repo("someone/model", files=contents)
        return open_hub("someone/model")

    return make_remote


@pytest.fixture
def source(make_source: MakeSource) -> CheckpointSource:
    return make_source(CONTENTS)


@pytest.fixture(params=["memory", "local", "hub"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "hub":
        made: Place = _place_on_the_hub(request)
    else:
        made = MemoryPlace() if request.param == "memory" else LocalPlace(tmp_path / "deep" / "out")
    yield made
    made.open().discard()


def _place_on_the_hub(request: pytest.FixtureRequest) -> Place:
    hub, open_sink = request.getfixturevalue("hub"), request.getfixturevalue("open_hub_sink")
    token = hub.create_token("somebody")
    return HubPlace(hub, lambda digest: open_sink("somebody/out", token, digest))


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Imported here: it takes seconds, and few files need it.
    import tinymodels

    folder = tinymodels.save_model(
        "llama",
        tmp_path_factory.mktemp("models") / "model",
        dtype="bf16",
        max_shard_size=tinymodels.SHARDED,
    )
    (folder / "tokenizer.json").write_text('{"left": "as it was"}')
    (folder / "notes.pt2").write_bytes(bytes(range(256)) * 8)
    return folder


@pytest.fixture
def somebodys_token(hub: Hub, llama_folder: Path) -> str:
    """A token of the user whose repos are written to; someone/llama is there to be read."""
    hub.create_repo("someone/llama", llama_folder)
    return hub.create_token("somebody")


@pytest.fixture
def machine(hub: Hub, tmp_path: Path, open_hub_sink: Callable[..., HubSink]) -> Iterator[Machine]:
    """A machine whose result is begun on the test Hub; its processes end with the test."""
    made = Machine(hub, tmp_path / "here", {})
    open_hub_sink(OUT, hub.create_token("somebody"))._staging.open(private=False)
    yield made
    for child in made.children.values():
        with suppress(ProcessLookupError):
            child.kill()
        child.communicate()
