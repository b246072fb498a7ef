"""A conversion whose source is on the Hub: the same result as from a folder, each byte once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tinymodels
from conversions import checksums
from hub.faults import Fault
from huggingface_hub import HfApi, hf_hub_download

from pissa_core.adapters.local import LocalSink, LocalSource
from pissa_core.engine import convert
from pissa_core.errors import DownloadCorrupt
from pissa_core.ports import CheckpointSource
from pissa_core.runtime import Runtime
from pissa_core.spec import parse_config

ID = "someone/llama"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tinymodels.save_model(
        "llama", tmp_path / "model", dtype="bf16", max_shard_size=tinymodels.SHARDED
    )
    (folder / "tokenizer.json").write_text('{"left": "as it was"}')
    return folder


def converted(source: CheckpointSource, out: Path) -> dict[str, str]:
    sink = LocalSink(out, digest="d1")
    for _ in convert(source, sink, parse_config({"rank": 2}), Runtime(device="cpu", slots=1)):
        pass
    return checksums(out)


def test_the_result_is_that_of_a_folder_and_every_shard_comes_once(hub, open_hub, folder, tmp_path):
    hub.create_repo(ID, folder)
    source = open_hub(ID)
    here, there = converted(LocalSource(folder), tmp_path / "a"), converted(source, tmp_path / "b")
    differing = {path for path in here.keys() | there if here.get(path) != there.get(path)}
    # These name the source or the output.
    assert differing <= {"README.md", "pissa_manifest.json", "pissa_init/adapter_config.json"}
    manifest = json.loads((tmp_path / "b" / "pissa_manifest.json").read_bytes())
    assert manifest["source"] == {"ref": f"hf://{ID}@{source.commit}", "commit": source.commit}
    shards = [path for path in there if path.startswith("model-")]
    data = sum((folder / shard).stat().st_size for shard in shards)
    sent = sum(seen.sent for seen in hub.requests("^/blobs/"))
    assert data <= sent <= data + len(shards) * (64 << 10)


def test_damaged_shards_leave_nothing_and_a_second_run_goes_on(hub, open_hub, folder, tmp_path):
    hub.create_repo(ID, folder)
    expected = converted(open_hub(ID), tmp_path / "undisturbed")
    size = min(path.stat().st_size for path in folder.glob("*.safetensors"))
    hub.faults.add(Fault("^/blobs/", times=10**6, corrupt_at=size - 1))
    with pytest.raises(DownloadCorrupt):
        converted(open_hub(ID), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hub.faults.clear()
    again = converted(open_hub(ID), tmp_path / "out")
    assert expected.keys() == again.keys()
    differing = {path for path in expected if expected[path] != again[path]}
    assert differing <= {"pissa_init/adapter_config.json", "pissa_manifest.json"}


def test_the_test_hub_is_a_hub_to_the_official_client(hub, folder, tmp_path):
    repo = hub.create_repo(ID, folder, private=True)
    repo.tags["v1"] = repo.branches["main"]
    api = HfApi(endpoint=hub.endpoint, token=hub.create_token("someone"))
    assert api.whoami()["name"] == "someone"
    api.auth_check(ID)
    api.auth_check(ID, write=True)
    assert [ref.name for ref in api.list_repo_refs(ID).tags] == ["v1"]
    assert [commit.commit_id for commit in api.list_repo_commits(ID)] == [repo.branches["main"]]
    (config,) = api.get_paths_info(ID, ["config.json", "missing"])
    assert config.size == (folder / "config.json").stat().st_size
    shard = next(folder.glob("*.safetensors")).name
    path = hf_hub_download(
        ID, shard, endpoint=hub.endpoint, token=api.token, local_dir=tmp_path / "copy"
    )
    assert Path(path).read_bytes() == (folder / shard).read_bytes()


def test_the_test_hub_runs_as_a_program(tmp_path):
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "config.json").write_text("{}")
    program = Path(__file__).parent.parent / "hub"
    command = [sys.executable, str(program), "--root", str(tmp_path)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as served:
        try:
            assert served.stdout is not None
            api = HfApi(endpoint=served.stdout.readline().strip(), token=False)
            assert api.list_repo_files("org/name") == ["config.json"]
        finally:
            served.send_signal(signal.SIGTERM)
        assert served.wait(30) == 0
