"""Docker, compose and CI files: valid, closed to the outside, naming only what exists."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from compose import COMPOSE, DOCKERFILE, SERVICES, Unset, command, environment, filled

from worker.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def run(*command: object, **options) -> subprocess.CompletedProcess:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120, **options)


def ours() -> dict[str, dict]:
    return {name: body for name, body in SERVICES.items() if "build" in body}


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
    published = {name: body["ports"] for name, body in SERVICES.items() if "ports" in body}
    assert list(published) == ["api"]
    for port in published["api"]:
        assert port.startswith("127.0.0.1:")


def test_keys_are_required_and_no_default_is_given():
    api = SERVICES["api"]["environment"]
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
    valkey = SERVICES["valkey"]
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
        assert body["volumes"] == ["data:/data", "${PISSA_MODELS:-models}:/models"]
        assert "healthcheck" in body
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


@pytest.mark.parametrize("service", ["api", "worker", "worker-gpu"])
def test_the_commands_of_the_containers_exist(service):
    words = command(service)
    done = run(BIN / words[0], words[1], "--help")
    assert done.returncode == 0, done.stderr
    for word in words[2:]:
        assert not word.startswith("--") or word in done.stdout


def test_without_keys_compose_refuses_to_start():
    with pytest.raises(Unset, match="PISSA_API_KEYS"):
        environment("api", {"PISSA_SECRET_KEY": "x"})
    told = environment("api", {"PISSA_SECRET_KEY": "x", "PISSA_API_KEYS": "k"})
    assert told["HF_ENDPOINT"] == "https://huggingface.co"
    assert told["PISSA_DATA_DIR"] == "/data"


def test_the_root_of_the_containers_can_be_read_only():
    """Everything they write lies on a volume or in memory."""
    for body in ours().values():
        assert body["read_only"] is True
        places = [filled(volume, {}).split(":")[1] for volume in body["volumes"]] + body["tmpfs"]
        told = environment("worker", {"PISSA_SECRET_KEY": "x"})
        for name in ("PISSA_DATA_DIR", "PISSA_LOCAL_ROOT", "HF_HOME"):
            assert any(Path(told[name]).is_relative_to(place) for place in places), name
    volumes = re.search(r"^VOLUME (.+)$", DOCKERFILE, re.MULTILINE)[1]
    for path in json.loads(volumes):
        assert path in re.search(r"install -d .+", DOCKERFILE)[0].split()


def test_every_setting_the_containers_get_is_one():
    known = {f"PISSA_{name.upper()}" for name in Settings.model_fields}
    for body in ours().values():
        named = {name for name in body["environment"] if name.startswith("PISSA_")}
        assert named <= known


def test_the_healthcheck_of_the_api_asks_a_route_without_a_key():
    test = SERVICES["api"]["healthcheck"]["test"]
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
