"""The service that rounds are played on, and what its jobs give when nobody disturbs them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from client import Client
from comparing import Outcome, clear, outcome_of
from household import Household, household
from pairs import make_pairs
from recipes import Recipe, recipes, write_models
from traces import Traces
from worker_tools import wait_for


class Stage:
    """A service, its client and its recipes; `ready` makes it anew after `close`."""

    home: Household
    client: Client
    recipes: list[Recipe]
    undisturbed: dict[str, Outcome]
    traces: Traces

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
        write_models(folder)
        self.recipes = recipes(folder / "models" / "out")
        home = self._open.enter_context(household(folder))
        self.client = Client(home.url)
        self._open.callback(self.client.close)
        make_pairs(home, self.client)
        self.undisturbed = {recipe.name: self._run_alone(home, recipe) for recipe in self.recipes}
        self.traces = Traces(home)
        self.home = home

    def close(self) -> None:
        """End every process of the service."""
        self._open.close()
        if hasattr(self, "home"):
            del self.home

    def _run_alone(self, home: Household, recipe: Recipe) -> Outcome:
        job_id = self.client.submit(dict(recipe.body), f"alone-{recipe.name}")
        wait_for(lambda: self.client.job(job_id)["finished_at"], recipe.name, 300)
        job = self.client.job(job_id)
        assert job["status"] == recipe.status, job
        found = outcome_of(home, self.client, recipe, job_id)
        assert bool(found.files) == (recipe.place != "nowhere")
        assert found.passed is recipe.passed, job
        assert self.client.ask("DELETE", f"/v1/jobs/{job_id}").status_code == 204
        clear(home, recipe)
        return found
