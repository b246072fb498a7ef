"""The jobs of the chaos suite: what is asked, and how each ends when nobody disturbs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubrepo import USER
from worker_tools import write_llama

EXACT = {"rank": 4, "svd": {"method": "exact"}}
NOT_FOUND = "folder_not_found"


@dataclass(frozen=True)
class Recipe:
    """One job: its body, where its files appear, and how it ends.

    Attributes:
        output: the folder that appears; None where the service keeps the files.
        repo: the repo of the test Hub that is filled instead.
        status: the state an undisturbed run ends in.
        code: of the error, where that is ``failed``.
        passed: the verdict, where there is one.
    """

    name: str
    body: Mapping[str, Any]
    output: Path | None = None
    repo: str | None = None
    status: str = "succeeded"
    code: str | None = None
    passed: bool | None = None

    @property
    def kind(self) -> str:
        return str(self.body.get("kind", "base-to-pissa"))

    @property
    def place(self) -> str:
        """Where the result goes: to a folder, to the Hub, kept by the service, or nowhere."""
        if self.kind == "verify" or self.status == "failed":
            return "nowhere"
        return "Hub" if self.repo else "folder" if self.output else "kept"


def write_models(folder: Path) -> None:
    """Write the checkpoints that jobs read: below ``models``, and for the Hub below ``hub``."""
    models, hub = folder / "models", folder / "hub" / "org"
    write_llama(models / "three", layers=3, hidden=256, shards=3)
    write_llama(models / "one", layers=2, hidden=320, shards=1)
    write_llama(models / "many", layers=2, hidden=64, shards=9)
    write_llama(hub / "three", layers=2, hidden=256, shards=3)
    write_llama(hub / "small", layers=1, hidden=96, shards=2)
    write_llama(models / "base", layers=4, hidden=512, shards=4)
    write_llama(hub / "base", layers=3, hidden=384, shards=3)


def recipes(out: Path) -> list[Recipe]:
    """Return what to ask for; `pairs` says what besides the checkpoints has to be there."""
    return [*_to_pissa(out), *_to_lora(out), *_to_base(out), *_verify()]


def _to_pissa(out: Path) -> list[Recipe]:
    def body(model: str, **pissa: Any) -> dict[str, Any]:
        return {"model": model, "pissa": pissa}

    return [
        _in_folder("local-three", body("./three", **EXACT), out),
        _in_folder("local-one", body("./one", **EXACT), out),
        _in_folder("local-many", body("./many", rank=8), out),
        _in_folder("hub-three", body("org/three", **EXACT), out),
        Recipe("hub-kept", body("org/small", rank=4)),
        _on_hub("local-to-hub", body("./three", **EXACT)),
        _on_hub("hub-to-hub", body("org/three", **EXACT)),
        _on_hub("many-to-hub", body("./many", rank=8)),
        _failing("no-folder", {"model": "./absent"}, NOT_FOUND),
        _failing("no-repo", {"model": "org/absent"}, "repo_not_found"),
        _failing("no-rank", body("./many", rank=999), "rank_too_large", out),
    ]


def _to_lora(out: Path) -> list[Recipe]:
    def body(trained: str, initial: str | None = None, **lora: Any) -> dict[str, Any]:
        named = {} if initial is None else {"initial": initial}
        return {"kind": "pissa-to-lora", "trained": trained, "lora": lora, **named}

    return [
        _in_folder("lora-local", body("./trained"), out),
        _in_folder("lora-from-hub", body(f"{USER}/trained", rank=6), out),
        Recipe("lora-kept", body("./trained", "./pair/pissa_init", tolerance=0.05)),
        _on_hub("lora-local-to-hub", body("./trained", rank=6)),
        _on_hub("lora-hub-to-hub", body(f"{USER}/trained")),
        _failing("lora-alien", body("./trained", "./alien"), "adapters_do_not_match", out),
    ]


def _to_base(out: Path) -> list[Recipe]:
    def body(residual: str, adapter: str) -> dict[str, Any]:
        return {"kind": "pissa-to-base", "residual": residual, "adapter": adapter}

    pair, initial = f"{USER}/pair", f"hf://{USER}/pair/pissa_init"
    return [
        _in_folder("base-local", body("./pair", "./trained"), out),
        _in_folder("base-from-hub", body(pair, initial), out),
        Recipe("base-kept", body("./pair", "./pair/pissa_init")),
        _on_hub("base-local-to-hub", body("./pair", "./trained")),
        _on_hub("base-hub-to-hub", body(pair, f"{USER}/trained")),
        _failing("base-alien", body("./three", "./pair/pissa_init"), "wrong_base", out),
    ]


def _verify() -> list[Recipe]:
    def body(original: str, converted: str) -> dict[str, Any]:
        return {"kind": "verify", "original": original, "converted": converted}

    return [
        Recipe("verify-local", body("./base", "./pair"), passed=True),
        Recipe("verify-hub", body("org/base", f"{USER}/pair"), passed=True),
        Recipe("verify-damaged", body("./base", "./damaged"), passed=False),
        _failing("verify-nothing", body("./absent", "./pair"), NOT_FOUND),
    ]


def _in_folder(name: str, body: Mapping[str, Any], out: Path) -> Recipe:
    return Recipe(name, {**body, "output": f"./{out.name}/{name}"}, output=out / name)


def _on_hub(name: str, body: Mapping[str, Any]) -> Recipe:
    repo = f"{USER}/{name}"
    return Recipe(name, {**body, "output": f"hf://{repo}"}, repo=repo)


def _failing(name: str, body: Mapping[str, Any], code: str, out: Path | None = None) -> Recipe:
    if out is None:
        return Recipe(name, body, status="failed", code=code)
    named = {**body, "output": f"./{out.name}/{name}"}
    return Recipe(name, named, output=out / name, status="failed", code=code)
