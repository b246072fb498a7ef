"""What happens in a round, decided beforehand from its seed: jobs, faults, and their moments."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from faults import FAULTS, Fault
from recipes import Recipe


@dataclass(frozen=True)
class Part:
    """One job of a round.

    Attributes:
        cancel_s: when to cancel it; None lets it run.
        discard: whether cancelling throws sealed work away.
        resume: whether it is resumed once it has been cancelled.
    """

    recipe: Recipe
    at_s: float
    cancel_s: float | None = None
    discard: bool = False
    resume: bool = False


@dataclass(frozen=True)
class Script:
    """A round: its jobs and its faults, both in the order of their moments."""

    seed: int
    jobs: tuple[Part, ...]
    faults: tuple[Fault, ...]

    def __str__(self) -> str:
        lines = [f"seed {self.seed}"]
        for job in self.jobs:
            cancelled = "" if job.cancel_s is None else (
                f", cancelled at {job.cancel_s:.2f} s"
                + ", discarded" * job.discard + ", resumed" * job.resume
            )  # fmt: skip
            lines.append(f"{job.at_s:5.2f} s  job {job.recipe.name}{cancelled}")
        lines += [
            f"{f.at_s:5.2f} s  {f.kind} (worker {f.which}, {f.for_s:.1f} s)" for f in self.faults
        ]
        return "\n".join(lines)


def write_script(seed: int, recipes: Sequence[Recipe], workers: int) -> Script:
    """Decide a round; the same seed gives the same."""
    dice = random.Random(seed)
    chosen = dice.sample(list(recipes), dice.randint(4, 6))
    jobs = tuple(sorted((_job(dice, recipe) for recipe in chosen), key=lambda job: job.at_s))
    kinds = dice.choices(
        list(FAULTS), [weight for weight, _ in FAULTS.values()], k=dice.randint(2, 5)
    )
    faults = tuple(
        sorted((_fault(dice, kind, workers) for kind in kinds), key=lambda fault: fault.at_s)
    )
    return Script(seed, jobs, faults)


def _job(dice: random.Random, recipe: Recipe) -> Part:
    at_s = dice.uniform(0, 2.5)
    if recipe.status != "succeeded" or dice.random() > 0.25:
        return Part(recipe, at_s)
    discard = dice.random() < 0.5
    return Part(
        recipe, at_s, at_s + dice.uniform(0, 6), discard, not discard or dice.random() < 0.5
    )


def _fault(dice: random.Random, kind: str, workers: int) -> Fault:
    return Fault(kind, dice.uniform(0, 6), dice.uniform(4, 7), dice.randrange(workers))
