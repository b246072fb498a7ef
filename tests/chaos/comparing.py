"""What has come of a job, as far as nothing that happened to it may change it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import hubrepo
from client import Client
from household import Household
from recipes import Recipe
from worker_tools import checksums

_OF_THE_RUN = ("seconds", "phase_seconds", "peak_memory_bytes", "manifest", "output")
_OF_THE_PLACE = "pissa_init/adapter_config.json"  # names the folder of kept files, a job's id


@dataclass(frozen=True)
class Outcome:
    """What two runs of one recipe must have in common.

    Attributes:
        files: the checksum of every file that has become visible.
        figures: of the result; what depends on the run is left out.
        report: the checksum of the manifest that the API gives.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    report: str = ""

    @property
    def passed(self) -> bool | None:
        """The verdict, if there is one."""
        return self.figures.get("passed")


def outcome_of(home: Household, client: Client, recipe: Recipe, job_id: str) -> Outcome:
    """Look at what a job that has ended gave, on the disk, on the Hub and by the API."""
    files = _files_of(home, recipe, job_id)
    result = client.job(job_id)["result"]
    if result is None:
        return Outcome(files)
    figures = {name: value for name, value in result.items() if name not in _OF_THE_RUN}
    manifest = client.ask("GET", f"/v1/jobs/{job_id}/manifest").json()
    manifest["files"].pop(_OF_THE_PLACE, None)
    text = json.dumps(manifest, sort_keys=True)
    return Outcome(files, figures, hashlib.sha256(text.encode()).hexdigest())


def _files_of(home: Household, recipe: Recipe, job_id: str) -> dict[str, str]:
    if recipe.repo:
        return hubrepo.files_of(home.hub_url, recipe.repo)
    output = recipe.output or home.settings.files_dir / job_id
    return checksums(output) if output.exists() else {}


def clear(home: Household, recipe: Recipe) -> None:
    """Remove a result, so that the recipe can be followed again."""
    if recipe.repo:
        hubrepo.delete(home.hub_url, recipe.repo)
    if recipe.output:
        shutil.rmtree(recipe.output, ignore_errors=True)
