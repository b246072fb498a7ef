"""Docker, compose and CI files: valid, closed to the outside, naming only what exists."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import httpx2
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()


def run(*command: object, **options) -> subprocess.CompletedProcess:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120, **options)


def ours() -> dict[str, dict]:
    return {name: body for name, body in COMPOSE["services"].items() if "build" in body}


def test_compose_file_fits_the_schema():
    done = run(
        BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml"
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_schema_check_would_find_a_mistake(tmp_path):
    broken = tmp_path / "docker-compose.yml"
    broken.write_text("services: {api: {imagee: x}}")
    done = run(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", broken)
    assert done.returncode == 1


def test_hadolint_has_nothing_to_say():
    done = run(BIN / "hadolint", "docker/Dockerfile")
    assert done.returncode == 0, done.stdout
    assert done.stdout == ""


def test_only_the_loopback_is_published_and_only_by_the_api():
    published = {
        name: body["ports"] for name, body in COMPOSE["services"].items() if "ports" in body
    }
    assert list(published) == ["api"]
    for port in published["api"]:
        assert port.startswith("127.0.0.1:")


def test_keys_are_required_and_no_default_is_given():
    api = COMPOSE["services"]["api"]["environment"]
    assert api["PISSA_API_KEYS"].startswith("${PISSA_API_KEYS:?")
    for body in ours().values():
        assert body["environment"]["PISSA_SECRET_KEY"].startswith("${PISSA_SECRET_KEY:?")
    example = dict(
        line.split("=", 1)
        for line in (ROOT / ".env.example").read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert example["PISSA_API_KEYS"] == example["PISSA_SECRET_KEY"] == ""


def test_every_variable_of_the_compose_file_is_explained():
    text = (ROOT / "docker-compose.yml").read_text()
    named = set(re.findall(r"\$\{(\w+)", text))
    example = (ROOT / ".env.example").read_text()
    for name in named - {"TORCH_INDEX"}:
        assert re.search(rf"^{name}=", example, re.MULTILINE), name


def test_the_store_loses_nothing_and_is_reachable_from_inside_only():
    valkey = COMPOSE["services"]["valkey"]
    words = " ".join(valkey["command"])
    for wanted in ("--appendonly yes", "--appendfsync always", "--maxmemory-policy noeviction"):
        assert wanted in words
    assert valkey["volumes"] == ["store:/data"]
    assert "healthcheck" in valkey
    assert valkey["networks"] == ["inside"]
    assert COMPOSE["networks"]["inside"]["internal"] is True


def test_a_worker_for_cpu_and_one_for_gpu():
    services = ours()
    assert services["worker"]["profiles"] == ["cpu"]
    assert services["worker-gpu"]["profiles"] == ["gpu"]
    devices = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices[0]["capabilities"] == ["gpu"]
    for body in services.values():
        assert body["volumes"] == ["data:/data"]
        assert body["depends_on"]["valkey"]["condition"] == "service_healthy"


def test_the_image_does_not_run_as_root():
    users = re.findall(r"^USER (\S+)", DOCKERFILE, re.MULTILINE)
    assert users[-1].split(":")[0] not in ("0", "root")


def test_every_path_the_dockerfile_copies_exists_and_reaches_the_build():
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE):
        for path in line.split()[:-1]:
            assert (ROOT / path).exists(), path
            assert f"!{path}" in allowed, path
    for body in ours().values():
        assert (ROOT / body["build"]["dockerfile"]).is_file()


def test_the_image_holds_every_package_of_the_project():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    copied = set(re.findall(r"^COPY (\w+) \1$", DOCKERFILE, re.MULTILINE))
    assert copied == packages


@pytest.mark.parametrize("service", ["worker", "worker-gpu"])
def test_the_commands_of_workers_exist(service):
    command = COMPOSE["services"][service]["command"]
    entry = re.search(r'^ENTRYPOINT \["(\w+)"\]', DOCKERFILE, re.MULTILINE)[1]
    done = run(BIN / entry, command[0], "--help")
    assert done.returncode == 0, done.stderr
    for word in command[1:]:
        assert not word.startswith("--") or word in done.stdout


def test_the_command_of_the_api_serves_and_asks_for_a_key(tmp_path):
    api = COMPOSE["services"]["api"]
    command = [BIN / api["entrypoint"][0], *api["entrypoint"][1:], "--port", "0"]
    environment = os.environ | {"PISSA_API_KEYS": "a-key-of-the-test", "PISSA_DATA_DIR": tmp_path}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        address = next(m[1] for line in process.stderr if (m := re.search(r"(http://\S+)", line)))
        assert httpx2.get(f"{address}/livez").status_code == 200
        assert httpx2.get(f"{address}/v1/jobs").status_code == 401
        key = {"Authorization": "Bearer a-key-of-the-test"}
        assert httpx2.get(f"{address}/v1/jobs", headers=key).json()["jobs"] == []
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_the_healthcheck_of_the_api_asks_a_route_without_a_key():
    test = COMPOSE["services"]["api"]["healthcheck"]["test"]
    compile(test[3], "healthcheck", "exec")
    assert "/livez" in test[3]


def test_the_ci_script_is_executable_bash():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert run("bash", "-n", script).returncode == 0


def test_make_knows_every_target_the_ci_script_asks_for():
    script = (ROOT / ".ci" / "run").read_text()
    targets = {
        word
        for line in re.findall(r"^make (.+)$", script, re.MULTILINE)
        for word in shlex.split(line)
    }
    assert {"check", "test"} <= targets
    for target in sorted(targets | {"setup", "demo", "bench", "clean", "test-slow"}):
        done = run("make", "--dry-run", target)
        assert done.returncode == 0, done.stderr


def test_constraints_are_exact_and_cover_every_requirement():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    normal = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    assert "+" not in normal["torch"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    for requirement in chain(project["dependencies"], *extras):
        name = re.match(r"[\w.-]+", requirement)[0]
        assert re.sub(r"[-_.]+", "-", name).lower() in normal, requirement


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
