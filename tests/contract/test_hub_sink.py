"""A result on the Hub: staged on a branch, nothing sent or fetched twice, shown by one commit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tinymodels
from places import contents_of

from pissa_core.engine import convert
from pissa_core.ports import CheckpointSink, CheckpointSource
from pissa_core.runtime import Runtime
from pissa_core.spec import parse_config

IN, OUT = "someone/llama", "somebody/out"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tinymodels.save_model(
        "llama",
        tmp_path_factory.mktemp("models") / "model",
        dtype="bf16",
        max_shard_size=tinymodels.SHARDED,
    )
    (folder / "tokenizer.json").write_text('{"left": "as it was"}')
    (folder / "tokenizer.model.bin.spm").write_bytes(bytes(range(256)) * 8)
    return folder


@pytest.fixture
def token(hub, folder) -> str:
    hub.create_repo(IN, folder)
    return hub.create_token("somebody")


def run(source: CheckpointSource, sink: CheckpointSink, **config) -> str:
    asked = parse_config({"rank": 2, **config})
    for _ in convert(source, sink, asked, Runtime(device="cpu", slots=1)):
        pass
    return sink.ref


def test_a_repo_is_converted_into_a_new_repo(hub, open_hub, open_hub_sink, token, tmp_path):
    source = open_hub(IN, token)
    ref = run(source, open_hub_sink(OUT, token))
    repo = hub.repos[OUT]
    assert ref == f"hf://{OUT}@{repo.branches['main']}"
    assert list(repo.branches) == ["main"]
    assert not repo.private
    assert len(repo.history("main")) == 2
    shown = contents_of(hub, OUT)
    manifest = json.loads(shown["pissa_manifest.json"])
    assert set(manifest["files"]) == set(shown) - {"pissa_manifest.json"}
    assert json.loads(shown["pissa_init/adapter_config.json"])["base_model_name_or_path"] == OUT
    assert not list(tmp_path.glob("here/**/*"))
    # Every shard comes down once and goes up once.
    for path, seen in source.files().items():
        if path.endswith(".safetensors"):
            assert hub.sent_bytes(f"{IN}/{path}") <= seen.size + (64 << 10)
    assert set(hub.uploads.finished.values()) == {1}


@pytest.mark.parametrize("cross_repo", [True, False])
def test_shards_without_targets_are_copied_on_the_hub_where_it_can(
    hub, open_hub, open_hub_sink, token, cross_repo
):
    hub.cross_repo = cross_repo
    source = open_hub(IN, token)
    run(source, open_hub_sink(OUT, token), target_modules=["q_proj"], layers_to_transform=[0])
    shown, files = contents_of(hub, OUT), source.files()
    shards = [path for path in files if path.endswith(".safetensors")]
    same = [path for path in shards if shown[path] == source.read(path)]
    assert 0 < len(same) < len(shards)
    for path in same:
        uploads = hub.uploads.finished[files[path].sha256]
        assert uploads == (0 if cross_repo else 1)
