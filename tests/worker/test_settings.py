"""Settings, the vault, storages and references: what is decided before any work."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from pissa_core.errors import InvalidRequest, OutsideLocalRoot, PissaError, TokenInvalid
from worker.contract import BaseToPissa, Verify
from worker.errors import error_from
from worker.logs import redact
from worker.node import Node, Role, start_method
from worker.places import Storages, output_ref, queue_names, storages
from worker.settings import Settings
from worker.vault import open_vault

DATA, ROOT = "d" * 16, "r" * 16


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PISSA_")]:
        monkeypatch.delenv(name)


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PISSA_API_KEYS", " one, two ,")
    monkeypatch.setenv("PISSA_DISK_BUDGET", "1.5 GB")
    monkeypatch.setenv("PISSA_LOCAL_ROOT", str(tmp_path))
    monkeypatch.setenv("PISSA_REDIS_URL", "")
    settings = Settings.from_env()
    assert settings.api_keys == ("one", "two")
    assert settings.disk_budget == 1_500_000_000
    assert settings.local_root == tmp_path
    assert settings.redis_url is None
    assert settings.data_dir == Path("~/.local/share/pissa").expanduser()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PISSA_DISK_BUDGET", "much", "PISSA_DISK_BUDGET: 'much' is not a size"),
        ("PISSA_DISK_BUDGET", "0", "PISSA_DISK_BUDGET: it must be greater than 0"),
        ("PISSA_REDIS_URL", "http://x", "PISSA_REDIS_URL: write redis://"),
        ("PISSA_LEASE_S", "-1", "PISSA_LEASE_S: it must be greater than 0"),
    ],
)
def test_a_bad_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidRequest, match=said):
        Settings.from_env()


def test_settings_are_frozen_and_travel_to_a_child(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = Settings(
        api_keys=("a", "b"), redis_url="redis://h/1", data_dir=tmp_path, secret_key="s", lease_s=3
    )
    with pytest.raises(ValidationError, match="frozen"):
        settings.lease_s = 4  # type: ignore[misc]
    for name, value in settings.as_env().items():
        monkeypatch.setenv(name, value)
    assert Settings.from_env() == settings
    assert "redis://h/1" not in repr(settings)


def test_a_generated_key_is_its_owners_alone_and_stays_the_same(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    sealed = open_vault(settings).seal("secret")
    assert (tmp_path / "secret.key").stat().st_mode & 0o777 == 0o600
    assert sealed is not None
    assert "secret" not in sealed
    assert open_vault(settings).open(sealed) == "secret"
    assert open_vault(settings).open(None) is None
    other = Settings(data_dir=tmp_path, secret_key="another")
    with pytest.raises(TokenInvalid, match="another PISSA_SECRET_KEY"):
        open_vault(other).open(sealed)


def test_storages_are_known_by_an_id_that_stays(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    settings = Settings(data_dir=tmp_path / "data", local_root=tmp_path / "root")
    first = storages(settings)
    assert storages(settings) == first
    assert first.data != first.root
    elsewhere = Settings(data_dir=tmp_path / "elsewhere", local_root=tmp_path / "root")
    assert storages(elsewhere).root == first.root
    assert storages(elsewhere).data != first.data


def test_queues_follow_from_what_a_job_touches() -> None:
    shared = Storages(DATA, ROOT)
    hub = {"model": "org/name", "output": "org/out"}
    cases = [
        (hub, ""),
        ({**hub, "output": None}, f".{DATA}"),
        ({**hub, "output": "./out"}, f".{ROOT}"),
        ({**hub, "model": "./in"}, f".{ROOT}"),
        ({"model": "./in"}, f".{DATA}+{ROOT}"),
    ]
    for body, suffix in cases:
        assert queue_names(BaseToPissa.model_validate(body), shared) == (
            f"plan{suffix}", f"work{suffix}",
        )  # fmt: skip
    assert set(shared.queues) == {suffix for _, suffix in cases}
    assert Storages(DATA).queues == ("", f".{DATA}")


def test_verify_keeps_no_files_and_so_needs_no_data_folder() -> None:
    asked = Verify(kind="verify", original="org/n", converted="./out")
    assert queue_names(asked, Storages(DATA, ROOT)) == (f"plan.{ROOT}", f"work.{ROOT}")


def test_a_local_output_stays_below_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    rooted = Settings(data_dir=tmp_path, local_root=root)
    inside = BaseToPissa.model_validate({"model": "./in", "output": str(root / "out")})
    assert str(output_ref(inside, "job_1", rooted)[0]) == str(root / "out")
    outside = BaseToPissa.model_validate({"model": "org/n", "output": "/etc/x"})
    with pytest.raises(OutsideLocalRoot, match="outside the folder"):
        output_ref(outside, "job_1", rooted)


def test_kept_files_lie_under_the_jobs_id(tmp_path: Path) -> None:
    ref, root = output_ref(BaseToPissa(model="org/n"), "job_1", Settings(data_dir=tmp_path))
    assert (str(ref), root) == (str(tmp_path / "files" / "job_1"), None)


def test_errors_keep_their_code_when_they_are_rebuilt() -> None:
    for code in ("not_found", "conflict", "plan_timeout", "store_unavailable", "rank_too_large"):
        error = error_from(code, "why", "how")
        assert (error.code, error.message, error.hint) == (code, "why", "how")
        assert type(error) is not PissaError


def test_logs_hold_no_hub_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    token = "hf_" + "Ab1" * 10
    assert token not in str(redact({"a": [token], token: f"x {token} y"}))
    code = (
        "import logging; from worker.logs import configure_logging; configure_logging('test')\n"
        f"try: raise ValueError('{token}')\n"
        f"except ValueError: logging.getLogger('x').exception('with %s', '{token}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert '"process": "test"' in done.stderr
    assert "hf_***" in done.stderr
    assert token not in done.stderr
    assert logging.getLogger("x").handlers == []


def test_the_api_side_loads_no_torch() -> None:
    modules = "worker.connect, worker.embedded, worker.main, worker.queue, worker.store"
    code = (
        f"import sys, {modules}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_store_loads_no_celery() -> None:
    code = "import sys, worker.store; print('celery' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("role", "device", "method"),
    [("compute", "cuda:0", "spawn"), ("compute", "cpu", "fork"), ("planner", "cuda:0", "fork")],
)
def test_only_what_touches_a_gpu_is_spawned(role: Role, device: str, method: str) -> None:
    node = Node(role=role, worker="w", device=device, queues="work", parent=1)
    assert start_method(node) == method
