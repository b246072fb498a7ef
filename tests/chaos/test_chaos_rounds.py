"""Random faults at random moments, round after round: no job is lost, none ends otherwise.

`make test-chaos ROUNDS=100` plays more of them; a failure names its seed, and
`make test-chaos ROUNDS=1 SEED=<seed>` plays that round again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from round import Round
from script import write_script
from stage import Stage
from tally import record

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = Stage(tmp_path_factory.mktemp("chaos"))
    yield made
    made.close()


def test_a_round_of_chaos(stage: Stage, seed: int) -> None:
    stage.ready()
    script = write_script(seed, stage.recipes, workers=2)
    print(script)
    began, passed = time.monotonic(), False
    played = Round(stage.home, stage.client, script, stage.undisturbed, stage.traces)
    try:
        played.play()
        passed = True
    finally:
        seconds = time.monotonic() - began
        record(script, passed=passed, seconds=seconds, broken=played.broken)
        if not passed:
            print(f"the logs lie in {stage.home.folder}")
            stage.close()
