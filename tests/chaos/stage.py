"""The service that rounds are played on, and what its jobs give when nobody disturbs them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from client import Client
from household import Household, household
from recipes import Recipe, write_recipes
from round import clear, result_of
from worker_tools import wait_for


class Stage:
    """A service, its client and its recipes; `ready` makes it anew after `close`."""

    home: Household
    client: Client
    recipes: list[Recipe]
    undisturbed: dict[str, dict[str, str]]

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self._open = ExitStack()

    def ready(self) -> None:
        """Start the service and run every recipe alone, unless it is there already."""
        if hasattr(self, "home"):
            return
        self._number += 1
        folder = self._folder / f"service-{self._number}"
        folder.mkdir()
        self.recipes = write_recipes(folder)
        self.home = self._open.enter_context(household(folder))
        self.client = Client(self.home.url)
        self._open.callback(self.client.close)
        self.undisturbed = {recipe.name: self._run_alone(recipe) for recipe in self.recipes}

    def close(self) -> None:
        """End every process of the service."""
        self._open.close()
        if hasattr(self, "home"):
            del self.home

    def _run_alone(self, recipe: Recipe) -> dict[str, str]:
        job_id = self.client.submit(dict(recipe.body), f"alone-{recipe.name}")
        wait_for(lambda: self.client.job(job_id)["finished_at"], recipe.name, 120)
        job = self.client.job(job_id)
        assert job["status"] == recipe.status, job
        found = result_of(self.home, recipe, job_id)
        assert bool(found) == (recipe.status == "succeeded")
        assert self.client.ask("DELETE", f"/v1/jobs/{job_id}").status_code == 204
        clear(self.home, recipe)
        return found
