"""The jobs of the chaos suite: what is asked, and how each ends when nobody disturbs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubrepo import USER
from worker_tools import write_llama

EXACT = {"rank": 4, "svd": {"method": "exact"}}


@dataclass(frozen=True)
class Recipe:
    """One job: its body, where its files appear, and how it ends.

    Attributes:
        output: the folder that appears; None where the service keeps the files.
        repo: the repo of the test Hub that is filled instead.
        status: the state an undisturbed run ends in.
        code: of the error, where that is ``failed``.
    """

    name: str
    body: Mapping[str, Any]
    output: Path | None = None
    repo: str | None = None
    status: str = "succeeded"
    code: str | None = None


def write_recipes(folder: Path) -> list[Recipe]:
    """Write the checkpoints below ``models`` and ``hub``, and return what to make of them."""
    models, out = folder / "models", folder / "models" / "out"
    write_llama(models / "three", layers=3, hidden=256, shards=3)
    write_llama(models / "one", layers=2, hidden=320, shards=1)
    write_llama(models / "many", layers=2, hidden=64, shards=9)
    write_llama(folder / "hub" / "org" / "three", layers=2, hidden=256, shards=3)
    write_llama(folder / "hub" / "org" / "small", layers=1, hidden=96, shards=2)
    return [
        _recipe("local-three", "three", out, EXACT),
        _recipe("local-one", "one", out, EXACT),
        _recipe("local-many", "many", out, {"rank": 8}),
        _recipe("hub-three", "org/three", out, EXACT),
        _recipe("hub-kept", "org/small", None, {"rank": 4}),
        _published("local-to-hub", "./three"),
        _published("hub-to-hub", "org/three"),
        Recipe("no-folder", {"model": "./absent"}, status="failed", code="folder_not_found"),
        Recipe("no-repo", {"model": "org/absent"}, status="failed", code="repo_not_found"),
        Recipe(
            "no-rank",
            {"model": "./many", "output": "./out/no-rank", "pissa": {"rank": 999}},
            out / "no-rank",
            status="failed",
            code="rank_too_large",
        ),
    ]


def _published(name: str, model: str) -> Recipe:
    repo = f"{USER}/{name}"
    return Recipe(name, {"model": model, "output": f"hf://{repo}", "pissa": EXACT}, repo=repo)


def _recipe(name: str, model: str, out: Path | None, config: Mapping[str, Any]) -> Recipe:
    local = not model.startswith("org/")
    body: dict[str, Any] = {"model": f"./{model}" if local else model, "pissa": dict(config)}
    if out is not None:
        body["output"] = f"./out/{name}"
    return Recipe(name, body, None if out is None else out / name)
