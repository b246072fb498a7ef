"""No certificate is false, whatever cluster is built to deceive it; hypothesis looks for one."""

from __future__ import annotations

import math
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

pytestmark = pytest.mark.usefixtures("one_thread")


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
    members = rank + 8 + wider
    sigma = floor * (1 + 1e-3 * torch.rand(240, generator=generator, dtype=torch.float64))
    sigma[: above + members] = 1 + spread * torch.rand(above + members, generator=generator)
    sigma[:above] *= 2
    W = with_spectrum(sigma.sort(descending=True).values, 280, 240, seed=seed).to(dtype)
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


@pytest.mark.parametrize("seed", [2, 50, 62, 123, 209])
def test_a_cluster_that_crowds_at_its_lower_end_hides_no_member(seed: int) -> None:
    # Thirteen members for a block of ten, the first well apart: found by a search for the worst.
    ends = (13, 1e-3), (9, 2e-5), (33, 2e-3), (36, 2e-3), (99, -1.0)
    levels = 1.0, 0.71, 0.71**2, 0.3 * 0.71**2, 0.09 * 0.71**2
    parts = [
        level * (1 + spread * torch.linspace(1, 0, members, dtype=torch.float64) ** 8)
        for level, (members, spread) in zip(levels, ends, strict=True)
    ]
    theta = torch.cat(parts).sort(descending=True).values
    assert_no_step_is_told_too_little(theta / theta[0], 2, seed)


def assert_no_step_is_told_too_little(theta: torch.Tensor, rank: int, seed: int) -> None:
    """Run the stop of `leading_eigenpairs` by every step's estimate, against the truth."""
    best = float(theta[:rank].sum())
    before = math.inf
    for step, values, couplings, block in krylov_steps(theta, rank, seed):
        latest = said = could_be_missing(values, couplings, rank, block, early=step <= EARLY_STEPS)
        if may_hide_members(values, rank, block):
            said = max(latest, before)
        before = latest
        assert step < LEAST_STEPS or 1 - float(values[:rank].sum()) / best <= said + RESOLUTION


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
