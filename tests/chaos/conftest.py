"""How many rounds of chaos, and from which seed."""

from __future__ import annotations

import os
import secrets

import pytest

ROUNDS, SEED = "PISSA_CHAOS_ROUNDS", "PISSA_CHAOS_SEED"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        first = int(os.environ.get(SEED) or secrets.randbelow(10**6) * 1000)
        rounds = int(os.environ.get(ROUNDS) or 20)
        metafunc.parametrize("seed", range(first, first + rounds))
