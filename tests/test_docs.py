"""What the documents say is what the code does: fields, settings, codes, commands, examples."""

import functools
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from compose import COMPOSE, SERVICES
from pydantic import TypeAdapter

import app.cli.errors
import app.errors
import worker.errors
from pissa_core.errors import all_errors
from pissa_core.spec import LoraOptions, PissaConfig, SvdConfig
from worker.contract import JobRequest
from worker.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
README = (ROOT / "README.md").read_text()
DEPLOY = (ROOT / "docs" / "deploy.md").read_text()
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def table_rows(heading: str) -> dict[str, list[str]]:
    """Return a table's rows below a heading: first cell without backticks → the other cells."""
    chapter = CONFIGURATION.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [
        line.strip("| ").split(" | ") for line in chapter.splitlines() if line.startswith("| `")
    ]
    found = {cells[0].strip("`"): cells[1:] for cells in rows}
    assert len(found) == len(rows), "a row stands twice"
    return found


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def bash_commands(text: str = README) -> list[list[str]]:
    """Return every command of a document's bash blocks, as words."""
    lines = "\n".join(code_blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@functools.cache
def help_of(command: str) -> str:
    done = subprocess.run(
        [BIN / "pissa", command, "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def defaults() -> dict[str, object]:
    config = PissaConfig().model_dump(mode="json")
    svd = config.pop("svd")
    return config | {f"svd.{name}": value for name, value in svd.items()}


def test_every_field_of_the_config_is_documented_with_its_default():
    rows = table_rows("The config of a conversion")
    assert list(rows) == [
        name if name != "svd" else ""
        for field in PissaConfig.model_fields
        for name in (
            [f"svd.{sub}" for sub in SvdConfig.model_fields] if field == "svd" else [field]
        )
    ]
    assert rows["lora_alpha"][0] == "= rank"
    assert PissaConfig(rank=5).lora_alpha == 5
    for name, default in defaults().items():
        if name == "lora_alpha":
            continue
        assert json.loads(rows[name][0].strip("`")) == default, name


def test_every_option_of_a_lora_is_documented_with_its_default():
    rows = table_rows("The options of pissa-to-lora")
    said = {name: json.loads(cells[0].strip("`")) for name, cells in rows.items()}
    assert said == LoraOptions().model_dump()


def test_every_setting_is_documented_with_its_default():
    rows = table_rows("The settings of the service")
    assert list(rows) == [f"PISSA_{name.upper()}" for name in Settings.model_fields]
    for name, field in Settings.model_fields.items():
        said = rows[f"PISSA_{name.upper()}"][0].strip("`")
        if isinstance(field.default, int | float | Path):
            assert said == str(field.default)
        else:
            assert not field.default
            assert said in ("none", "generated")


def test_every_error_code_is_documented():
    assert app.errors.HttpError  # its classes, the store's and the command's hang in the same tree
    assert app.cli.errors.ServiceUnreachable
    assert worker.errors.StoreError
    rows = table_rows("Error codes")
    houses = ("pissa_core.", "worker.", "app.")  # other tests may hang classes of their own in it
    raised = {e.code: e for e in all_errors() if e.__module__.startswith(houses)}
    assert set(rows) == set(raised)
    for code, error in raised.items():
        assert ("retryable" in rows[code][0]) == error.retryable, code


def pissa_commands() -> list[list[str]]:
    """Return the commands of README and deploy.md that run `pissa`, without what they set."""
    commands = [*bash_commands(), *bash_commands(DEPLOY)]
    return [words[words.index("pissa") :] for words in commands if "pissa" in words]


@pytest.mark.parametrize("words", pissa_commands(), ids=lambda words: " ".join(words))
def test_the_commands_of_the_documents_exist(words):
    options = help_of(words[1])
    for word in words[2:]:
        if word.startswith("--"):
            assert f"{word} " in options or f"{word}\n" in options, word


@pytest.mark.parametrize(
    "words", [w for w in bash_commands() if w[0] == "make"], ids=lambda words: " ".join(words)
)
def test_the_make_targets_of_the_readme_exist(words):
    done = subprocess.run(
        ["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_uses_no_other_programs():
    assert {words[0] for words in bash_commands()} == {"make", "pissa", "curl", "cp", "docker"}


def test_what_deploy_says_of_containers_is_in_the_compose_file():
    programs = ("up", "ps", "stop", "exec")
    for words in bash_commands(DEPLOY):
        if words[:2] == ["docker", "compose"]:
            assert words[2] in programs
            named = {word for word in words[3:] if not word.startswith("-")}
            assert named - {"valkey-cli", "BGREWRITEAOF"} <= set(SERVICES), words
    volumes = re.findall(r"-v pissa_(\w+):", DEPLOY)
    assert set(volumes) == {"store", "data"} <= set(COMPOSE["volumes"])
    loader = type("Tagged", (yaml.SafeLoader,), {})
    loader.add_multi_constructor("!", lambda load, _, node: load.construct_sequence(node))
    (block,) = code_blocks(DEPLOY, "yaml")
    for name, body in yaml.load(block, loader)["services"].items():
        assert body.get("extends", {"service": name})["service"] in SERVICES
    for words in re.findall(r"`(?:args|exec): \[(.+?)\]`", DEPLOY):
        program = [word.strip('" ') for word in words.split(",")]
        if program[0] == "python":
            assert importlib.util.find_spec(program[2])
        else:
            assert all(w in help_of(program[0]) for w in program if w.startswith("--"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_variable_that_is_named_exists(document):
    known = {f"PISSA_{name.upper()}" for name in Settings.model_fields}
    known |= {"PISSA_URL", "PISSA_API_KEY"}
    known |= set(re.findall(r"^(PISSA_\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    named = set(re.findall(r"`(PISSA_[A-Z_]+)`", document.read_text()))
    assert named <= known


def test_the_bodies_of_the_readme_are_accepted():
    bodies = [
        words[words.index("-d") + 1]
        for words in bash_commands()
        if words[0] == "curl" and "-d" in words
    ]
    assert len(bodies) >= 2
    for body in bodies:
        TypeAdapter(JobRequest).validate_json(body)


def test_the_routes_of_the_readme_are_in_the_api():
    from app.asgi import make_app

    paths = make_app(Settings()).openapi()["paths"]
    for words in bash_commands():
        if words[0] != "curl":
            continue
        (url,) = [word for word in words if word.startswith("http://127.0.0.1:8000")]
        path = url.removeprefix("http://127.0.0.1:8000").replace("$ID", "{job_id}")
        method = "post" if "-d" in words or "POST" in words else "get"
        assert path in paths, path
        assert method in paths[path], (method, path)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), target


def test_the_python_of_the_readme_is_python():
    blocks = code_blocks(README, "python")
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")


def test_the_rooms_of_the_architecture_exist():
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text().split("```mermaid")[0]
    room = ROOT
    named = 0
    for row in re.findall(r"^\| (.+?) \|", text, re.MULTILINE):
        if heading := re.match(r"\*\*(\w+)/\*\*", row):
            room = ROOT / heading[1]
            assert room.is_dir(), room
        else:
            for name in re.findall(r"`([\w./]+)`", row):
                assert (room / name).exists(), name
                named += 1
    assert named > 15


def test_every_module_of_the_core_has_its_row_in_the_architecture():
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    for path in (ROOT / "pissa_core").iterdir():
        if path.name.startswith("_") or path.suffix not in ("", ".py"):
            continue
        name = f"{path.name}/" if path.is_dir() else path.name
        assert f"`{name}`" in text, name
