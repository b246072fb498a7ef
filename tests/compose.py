"""docker-compose.yml and the Dockerfile as a container engine would read them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
_VARIABLE = re.compile(r"\$\{(\w+)(?:(:-|:\?)([^}]*))?\}")


class Unset(Exception):
    """A variable that must be set is not; compose refuses to start."""


def filled(text: str, values: Mapping[str, str]) -> str:
    """Put values where ``${NAME}``, ``${NAME:-default}`` or ``${NAME:?why}`` stands."""

    def value(match: re.Match[str]) -> str:
        name, how, rest = match.groups()
        given = values.get(name, "")
        if not given and how == ":?":
            raise Unset(rest)
        return given or (rest if how == ":-" else "")

    return _VARIABLE.sub(value, text)


def image_environment() -> dict[str, str]:
    """Return what the image's last stage sets with ENV."""
    last = DOCKERFILE.rpartition("\nFROM ")[2].replace("\\\n", " ")
    lines = re.findall(r"^ENV (.+)$", last, re.MULTILINE)
    return dict(word.split("=", 1) for line in lines for word in line.split())


def environment(service: str, values: Mapping[str, str]) -> dict[str, str]:
    """Return the variables a container of the service gets."""
    declared = SERVICES[service]["environment"]
    return image_environment() | {name: filled(text, values) for name, text in declared.items()}


def command(service: str) -> list[str]:
    """Return what a container of the service runs: the image's entry point and its own command."""
    entry = re.search(r'^ENTRYPOINT \["([^"]+)"\]', DOCKERFILE, re.MULTILINE)
    assert entry is not None
    return [entry[1], *SERVICES[service]["command"]]
