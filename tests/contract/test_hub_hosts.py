"""Who is spoken to, and what it costs: no host of a user's choice, no token to another, headers."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from hub.faults import Fault
from hub.giants import Llama, Weights
from pydantic import TypeAdapter, ValidationError

from pissa_core.errors import PissaError
from pissa_core.fold.adapter import read_adapter
from pissa_core.fold.belonging import trace
from pissa_core.planning import make_plan
from pissa_core.refs import HubRef, parse_output, parse_ref
from pissa_core.spec import parse_config
from worker.contract import JobRequest

ID = "someone/model"
FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 100}
SOME_HUNDRED_KB = 600_000


class _Elsewhere(http.server.ThreadingHTTPServer):
    """A host that is nobody's business; it writes down who comes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Visits)
        self.visits: list[tuple[str, str, str | None]] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class _Visits(http.server.BaseHTTPRequestHandler):
    server: _Elsewhere

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self) -> None:
        self.server.visits.append((self.command, self.path, self.headers.get("Authorization")))
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = do_POST = do_PUT = answer


@contextmanager
def _serving() -> Iterator[_Elsewhere]:
    with _Elsewhere() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def elsewhere() -> Iterator[_Elsewhere]:
    with _serving() as server:
        yield server


HOSTILE = (
    "http://{host}/someone/model",
    "hf://http://{host}/model",
    "hf://{host}/model",
    "{host}/model",
    "//{host}/model",
    "someone@{host}/model",
    "someone/model@http://{host}/x",
    "hf://someone/model@http%3A%2F%2F{host}%2Fx",
    "hf://someone/model@main/%2F%2F{host}/x",
    "hf://someone/model@main/..%2F..%2F..%2F{host}",
    "hf://someone/model@..%2F..%2F..%2F..%2F{host}%2Fx",
    "someone/model?endpoint=http://{host}",
    "someone/model#@{host}",
    "..%2F..%2F{host}/model",
)


@pytest.mark.parametrize("ref", HOSTILE)
def test_no_reference_chooses_a_host(hub, open_hub, elsewhere, ref):
    hub.create_repo(ID, files=FILES)
    with suppress(PissaError):
        parsed = parse_ref(ref.format(host=elsewhere.address))
        if isinstance(parsed, HubRef):
            open_hub(str(parsed), token=hub.create_token("someone")).files()
    with suppress(PissaError):
        parse_output(ref.format(host=elsewhere.address))
    assert elsewhere.visits == []
    assert all(seen.path.startswith("/api/models/") for seen in hub.seen)
    assert all("/../" not in seen.path for seen in hub.seen)


def test_no_file_of_a_repo_chooses_a_host(hub, open_hub, elsewhere):
    """An adapter names its base in whatever words it likes; it is asked for as a repo or not."""
    base = f'"http://{elsewhere.address}/someone/base"'
    config = b'{"peft_type": "LORA", "base_model_name_or_path": ' + base.encode() + b"}"
    empty = (2).to_bytes(8, "little") + b"{}"
    hub.create_repo("someone/residual", files={"config.json": b"{}", "model.safetensors": empty})
    adapter = {"adapter_config.json": config, "adapter_model.safetensors": empty}
    hub.create_repo("someone/adapter", files=adapter)
    asked = []

    def open_other(ref):
        asked.append(ref)
        return open_hub(str(ref))

    with pytest.raises(PissaError, match="was trained on http"):
        trace(open_hub("someone/residual"), read_adapter(open_hub("someone/adapter")), open_other)
    assert asked == []
    assert elsewhere.visits == []


@pytest.mark.parametrize("name", ["endpoint", "hf_endpoint", "url", "hub", "token"])
def test_no_field_of_a_request_chooses_a_host(name):
    body = {"kind": "base-to-pissa", "model": ID, "output": "hf://me/out"}
    jobs = TypeAdapter(JobRequest)
    jobs.validate_python(body)
    with pytest.raises(ValidationError, match=name):
        jobs.validate_python({**body, name: "http://127.0.0.1:1"})
    with pytest.raises(ValidationError, match=name):
        jobs.validate_python({**body, "output": {"ref": "hf://me/out", name: "http://x"}})


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_to_another_host_takes_no_token_along(hub, open_hub, elsewhere, status):
    hub.create_repo(ID, files=FILES)
    token = hub.create_token("someone")
    source = open_hub(ID, token=token)
    away = {"Location": f"http://{elsewhere.address}/away"}
    hub.faults.add(Fault("/resolve/", status=status, headers=away))
    with pytest.raises(PissaError):
        source.read("model.safetensors")
    hub.faults.add(Fault("^/api/models/", status=status, headers=away))
    with pytest.raises(PissaError):
        open_hub(ID, token=token)
    assert elsewhere.visits == [("GET", "/away", None)] * 2
    assert all(seen.headers["authorization"] == f"Bearer {token}" for seen in hub.seen)


def test_a_redirect_of_what_writes_takes_no_token_along(hub, open_hub_sink, elsewhere):
    sink = open_hub_sink("me/out", hub.create_token("me"))
    away = {"Location": f"http://{elsewhere.address}/away"}
    hub.faults.add(Fault("/repos/create", "POST", status=307, headers=away))
    with pytest.raises(PissaError), sink.attempt("model.safetensors"):
        pass
    assert elsewhere.visits == [("POST", "/away", None)]


def test_planning_a_llama_3_70b_costs_some_hundred_kilobytes(hub, open_hub):
    files = Llama().files()
    known = {
        path: Weights(blob.header, blob.size, hashlib.sha256(path.encode()).hexdigest())
        for path, blob in files.items()
        if isinstance(blob, Weights)
    }
    hub.create_repo("big/llama", files={**files, **known})
    plan = make_plan(open_hub("big/llama"), parse_config({"rank": 16}))
    assert len(plan.shards) == 30
    assert len(plan.matrices) == 7 * 80
    assert plan.estimate.read > 141e9
    sent = hub.sent_bytes()
    assert sent < SOME_HUNDRED_KB
    shards = {path: hub.sent_bytes(f"big/llama/{path}") for path in known}
    assert all(len(known[path].header) <= sent <= 16 << 10 for path, sent in shards.items())
