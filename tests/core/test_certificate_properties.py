"""No certificate is false, whatever cluster is built to deceive it; hypothesis looks for one."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spectra import missed_energy, with_spectrum

from pissa_core.certify import certify
from pissa_core.svd import RESOLUTION, truncated_svd
from pissa_core.svd.krylov import EARLY_STEPS, LEAST_STEPS
from pissa_core.svd.missing import could_be_missing, may_hide_members
from pissa_core.svd.routes import oversampling

pytestmark = pytest.mark.usefixtures("one_thread", "bfloat16_products")


@given(
    rank=st.sampled_from([1, 2, 4]),
    above=st.integers(0, 3),
    wider=st.sampled_from([-1, 0, 1, 2, 8, 9, 11, 12, 13, 24]),
    spread=st.sampled_from([0.0, 1e-5, 1e-4, 1e-3, 1e-2, 0.1]),
    floor=st.sampled_from([0.01, 0.5, 0.9]),
    tolerance=st.sampled_from([3e-2, 1e-2, 1e-3, 1e-5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**32),
)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_clusters_one_to_three_blocks_wide(
    rank: int,
    above: int,
    wider: int,
    spread: float,
    floor: float,
    tolerance: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    members = rank + oversampling(rank) + wider
    sigma = floor * (1 + 1e-3 * torch.rand(300, generator=generator, dtype=torch.float64))
    sigma[: above + members] = 1 + spread * torch.rand(above + members, generator=generator)
    sigma[:above] *= 2
    W = with_spectrum(sigma.sort(descending=True).values, 340, 300, seed=seed).to(dtype)
    found = truncated_svd(W, rank, method="auto", tolerance=tolerance, niter=0, seed=seed)
    missed = missed_energy(W, found.U, found.S, found.Vt)
    said = certify(found, torch.zeros_like(found.S), 0.0).missed
    assert missed <= said <= tolerance


@given(
    rank=st.sampled_from([1, 4, 16]),
    clusters=st.lists(
        st.tuples(
            st.integers(1, 60),
            st.sampled_from([0.0, 1e-4, 3e-3, 0.1]),
            st.sampled_from([0.3, 0.6, 0.9, 0.97]),
        ),
        min_size=4,
        max_size=12,
    ),
    seed=st.integers(0, 2**32),
)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_step_of_a_krylov_run_is_told_that_less_is_missing_than_is(
    rank: int, clusters: list[tuple[int, float, float]], seed: int
) -> None:
    assert_no_step_is_told_too_little(staircase(clusters, 200, seed), rank, seed)


@pytest.mark.parametrize("blocks", [1, 1.5, 2])
@pytest.mark.parametrize("rank", [1, 2])
def test_no_climb_to_worse_clusters_finds_a_false_estimate(rank: int, blocks: float) -> None:
    # Of as many members as one block of starts is wide it may all but lack one: of a square
    # Gaussian matrix the smallest singular value is small more often than that of a wide one.
    draw = random.Random(5)
    worst, kept = 0.0, (1e-3, 8.0, 0.6)  # spread, crowding at the lower end, floor
    for _ in range(40):
        spread, power, floor = (x * math.exp(draw.gauss(0, 0.2)) for x in kept)
        theta = crowded(round(blocks * (rank + oversampling(rank))), spread, power, min(floor, 0.9))
        share = max(worst_share(theta, rank, draw.randrange(2**32)) for _ in range(4))
        assert share <= 1, (spread, power, floor)
        if share > worst:
            worst, kept = share, (spread, power, floor)


def crowded(members: int, spread: float, power: float, floor: float) -> torch.Tensor:
    """Return 160 eigenvalues, descending from 1: a cluster that crowds at its lower end."""
    ends = torch.linspace(1, 0, members, dtype=torch.float64)
    rest = floor * torch.linspace(1, 0, 160 - members, dtype=torch.float64)
    theta = torch.cat([1 + spread * ends**power, rest])
    return theta / theta[0]


def assert_no_step_is_told_too_little(theta: torch.Tensor, rank: int, seed: int) -> None:
    """Run the stop of `leading_eigenpairs` by every step's estimate, against the truth."""
    assert worst_share(theta, rank, seed) <= 1


def worst_share(theta: torch.Tensor, rank: int, seed: int) -> float:
    """Return the largest, over the steps, of what is missing over what it is said to be."""
    best, worst = float(theta[:rank].sum()), 0.0
    before = math.inf
    for step, values, couplings, block in krylov_steps(theta, rank, seed):
        latest = said = could_be_missing(values, couplings, rank, block, early=step <= EARLY_STEPS)
        if may_hide_members(values, rank, block):
            said = max(latest, before)
        before = latest
        if step >= LEAST_STEPS:
            missed = 1 - float(values[:rank].sum()) / best
            worst = max(worst, missed / (said + RESOLUTION))
    return worst


def staircase(clusters: list[tuple[int, float, float]], d: int, seed: int) -> torch.Tensor:
    """Return d eigenvalues, descending from 1: clusters of (members, spread, drop to the next)."""
    generator = torch.Generator().manual_seed(seed)
    level, parts = 1.0, []
    for members, spread, drop in clusters:
        offsets = torch.rand(members, dtype=torch.float64, generator=generator)
        parts.append(level * (1 + spread * offsets))
        level *= drop
    floor = level * torch.linspace(1, 0, d, dtype=torch.float64)
    values = torch.cat([*parts, floor])[:d].sort(descending=True).values
    return values / values[0]


def krylov_steps(
    theta: torch.Tensor, rank: int, seed: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, int]]:
    """Yield step, Ritz values, couplings and block of a plain float64 run on diag(theta)."""
    block, d = rank + oversampling(rank), len(theta)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(d, block, dtype=torch.float64, generator=generator)
    K = torch.linalg.qr(start).Q.T
    for step in range(1, 9):
        if len(K) + block > d:
            return
        T = (K * theta) @ K.T
        values, S = torch.linalg.eigh(T)
        Y = K[-block:] * theta
        rest = Y - (Y @ K.T) @ K
        Q = torch.linalg.qr((rest - (rest @ K.T) @ K).T).Q.T
        couplings = Q @ rest.T @ S[-block:]
        yield step, values.flip(0), couplings.flip(1), block
        K = torch.cat([K, Q])
