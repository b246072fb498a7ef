"""`pissa fetch` against services that behave, break off, lie and misbehave."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from cli_tools import environment, pissa

JOB = "job_0123"
WEIGHTS = bytes(range(256)) * 8192  # 2 MiB: more than one chunk
KEY = "a secret key"


def a_result(kept_at: str) -> dict[str, bytes]:
    """Return the files of a small result, with a manifest that fits them."""
    files = {
        "config.json": b"{}",
        "model.safetensors": WEIGHTS,
        "pissa_init/adapter_config.json": json.dumps(
            {"base_model_name_or_path": kept_at, "init_lora_weights": True}
        ).encode(),
        "odd name #1?.txt": b"odd",
        "empty.txt": b"",
    }
    listed = {path: {"sha256": digest(data), "size": len(data)} for path, data in files.items()}
    manifest = json.dumps({"schema": 1, "files": listed}).encode()
    return {**files, "pissa_manifest.json": manifest}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Behaviour:
    """What the service at the other end does."""

    files: dict[str, bytes]
    status: str = "succeeded"
    cut_at: int | None = None
    ranges: bool = True
    lie: bool = False
    kind: str = "base-to-pissa"
    listed_path: str | None = None
    seen: list[tuple[str, str | None]] = field(default_factory=list)


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            if self.headers.get("Authorization") != f"Bearer {KEY}":
                return self._json(401, {"code": "unauthorized", "detail": "no key was given"})
            if path == f"/v1/jobs/{JOB}":
                return self._json(
                    200, {"id": JOB, "kind": behaviour.kind, "status": behaviour.status}
                )
            if path == f"/v1/jobs/{JOB}/files":
                return self._json(200, {"files": self._listing()})
            name = path.removeprefix(f"/v1/jobs/{JOB}/files/")
            if name in behaviour.files:
                return self._file(name)
            return self._json(404, {"code": "not_found", "detail": f"no {path}", "hint": None})

        def _listing(self) -> list[dict[str, Any]]:
            listed = [
                {"path": path, "size": len(data), "sha256": digest(data)}
                for path, data in behaviour.files.items()
            ]
            if behaviour.lie:
                listed[1]["sha256"] = "0" * 64
            if behaviour.listed_path:
                listed[0]["path"] = behaviour.listed_path
            return listed

        def _file(self, name: str) -> None:
            asked = self.headers.get("Range")
            behaviour.seen.append((name, asked))
            data, status = behaviour.files[name], 200
            if asked and behaviour.ranges:
                data, status = data[int(asked.removeprefix("bytes=").rstrip("-")) :], 206
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if name == "model.safetensors" and behaviour.cut_at is not None:
                data, behaviour.cut_at = data[: behaviour.cut_at], None
                self.close_connection = True
            self.wfile.write(data)

        def _json(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def fetch(url: str, folder: Path, *more: str, key: str = KEY) -> Any:
    env = environment(PISSA_URL=url, PISSA_API_KEY=key)
    return pissa("fetch", JOB, folder, *more, env=env)


def test_all_files_arrive_checked_and_the_adapter_names_its_new_place(tmp_path: Path) -> None:
    behaviour = Behaviour(a_result("/srv/pissa/files/job_0123"))
    out = tmp_path / "deep" / "out"
    with serving(behaviour) as url:
        done = fetch(url, out, "--json")
    assert done.returncode == 0, done.stderr
    sizes = sum(len(data) for data in behaviour.files.values())
    assert json.loads(done.stdout) == {"output": str(out), "files": 6, "bytes": sizes}
    assert list(out.parent.iterdir()) == [out]
    rewritten = {"pissa_init/adapter_config.json", "pissa_manifest.json"}
    for path, data in behaviour.files.items():
        assert (out / path).is_file()
        if path not in rewritten:
            assert (out / path).read_bytes() == data
    config = json.loads((out / "pissa_init/adapter_config.json").read_bytes())
    assert config == {"base_model_name_or_path": str(out), "init_lora_weights": True}
    manifest = json.loads((out / "pissa_manifest.json").read_bytes())
    for path, info in manifest["files"].items():
        data = (out / path).read_bytes()
        assert info == {"sha256": digest(data), "size": len(data)}


@pytest.mark.parametrize(
    ("config", "loader"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": ["Own"], "auto_map": {"AutoModel": "own.Own"}}, "AutoModel"),
        ({"architectures": ["x; import os"]}, "AutoModel"),
        ({"architectures": None}, "AutoModel"),
        ([], "AutoModel"),
    ],
)
def test_it_is_said_with_which_class_to_load(tmp_path: Path, config: Any, loader: str) -> None:
    files = a_result("org/name") | {"config.json": json.dumps(config).encode()}
    with serving(Behaviour(files)) as url:
        done = fetch(url, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert f"from transformers import {loader}\n" in done.stdout
    assert f'base = {loader}.from_pretrained("{tmp_path / "out"}")' in done.stdout


def test_it_is_said_how_to_load_a_plain_lora_and_a_plain_model(tmp_path: Path) -> None:
    named = {
        "base_model_name_or_path": 'org/name"\nimport os', "revision": "v1", "task_type": "SEQ_CLS"
    }  # fmt: skip
    lora = {"adapter_config.json": json.dumps(named).encode()}
    plain = {"config.json": b'{"architectures": ["GPT2LMHeadModel"]}'}
    base = (
        'base = AutoModelForSequenceClassification.from_pretrained("org/name\\"\\nimport os", '
        'revision="v1")'
    )
    for files, before, last in (
        (lora, base, 'model = PeftModel.from_pretrained(base, "{}")'),
        (plain, "", 'model = GPT2LMHeadModel.from_pretrained("{}")'),
    ):
        out = tmp_path / last[8:12]
        with serving(Behaviour(files)) as url:
            done = fetch(url, out)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-2:] == [before, last.format(out)]
        assert "pissa_init" not in done.stdout


def test_a_verification_has_no_files_but_a_report(tmp_path: Path) -> None:
    with serving(Behaviour({}, kind="verify")) as url:
        done = fetch(url, tmp_path / "out")
    assert done.returncode == 1
    assert f"hint: its report is {url}/v1/jobs/{JOB}/manifest" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_names_a_repo_is_left_as_it_is(tmp_path: Path) -> None:
    behaviour = Behaviour(a_result("org/name"))
    with serving(behaviour) as url:
        done = fetch(url, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for path, data in behaviour.files.items():
        assert (tmp_path / "out" / path).read_bytes() == data
    assert f'PeftModel.from_pretrained(\n    base, "{tmp_path / "out"}"' in done.stdout


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_broke_off_goes_on(tmp_path: Path, ranges: bool) -> None:
    behaviour = Behaviour(a_result("org/name"), cut_at=1_500_000, ranges=ranges)
    out = tmp_path / "out"
    with serving(behaviour) as url:
        broken = fetch(url, out)
        assert broken.returncode == 1
        assert broken.stderr.splitlines()[-2].startswith("error[service_unreachable]: ")
        assert not out.exists()
        first = len(behaviour.seen)
        done = fetch(url, out)
    assert done.returncode == 0, done.stderr
    assert (out / "model.safetensors").read_bytes() == WEIGHTS
    again = dict(behaviour.seen[first:])
    assert "config.json" not in again  # it was here, and its checksum right
    asked = again["model.safetensors"]
    assert asked is not None
    assert 0 < int(asked.removeprefix("bytes=").rstrip("-")) <= 1_500_000


def test_a_partial_file_that_was_spoilt_is_begun_anew(tmp_path: Path) -> None:
    behaviour = Behaviour(a_result("org/name"), cut_at=1_500_000)
    with serving(behaviour) as url:
        fetch(url, tmp_path / "out")
        (partial,) = tmp_path.glob(f".out.pissa-fetch-{JOB}/model.safetensors")
        with partial.open("r+b") as file:
            file.write(b"spoilt")
        done = fetch(url, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS


def test_a_wrong_checksum_is_an_error_and_nothing_appears(tmp_path: Path) -> None:
    with serving(Behaviour(a_result("org/name"), lie=True)) as url:
        done = fetch(url, tmp_path / "out")
    assert (done.returncode, done.stdout) == (1, "")
    assert "error[download_corrupt]: model.safetensors arrived twice" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["../evil", "/etc/evil", "a/../../evil", "a\\..\\evil", ""])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    behaviour = Behaviour(a_result("org/name"), listed_path=path or ".")
    with serving(behaviour) as url:
        done = fetch(url, tmp_path / "out")
    assert done.returncode == 1
    assert "error[unsafe_path]: " in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_refused_before_the_service_is_asked(
    tmp_path: Path,
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    behaviour = Behaviour(a_result("org/name"))
    with serving(behaviour) as url:
        done = fetch(url, tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error[output_exists]: {tmp_path} exists")
    assert behaviour.seen == []
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with serving(Behaviour(a_result("org/name"))) as url:
        assert fetch(url, tmp_path / "out").returncode == 0
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_job_that_has_not_succeeded_has_no_files(tmp_path: Path) -> None:
    with serving(Behaviour({}, status="running")) as url:
        done = fetch(url, tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error[conflict]: job {JOB} is running; "
        "only the files of one that succeeded can be fetched",
        f"hint: `pissa watch {JOB}` waits for it",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_failed_is_not_waited_for(tmp_path: Path) -> None:
    with serving(Behaviour({}, status="failed")) as url:
        done = fetch(url, tmp_path / "out")
    assert done.returncode == 1
    assert f"hint: `pissa resume {JOB}` lets it go on" in done.stderr


def test_a_problem_document_is_shown_with_its_code(tmp_path: Path) -> None:
    with serving(Behaviour({})) as url:
        done = fetch(url, tmp_path / "out", key="another key")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error[unauthorized]: no key was given",
        "hint: set PISSA_API_KEY",
    ]
