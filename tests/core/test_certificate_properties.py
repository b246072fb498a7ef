"""No certificate is false, whatever cluster is built to deceive it; hypothesis looks for one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spectra import missed_energy, with_spectrum

from pissa_core.certify import certify
from pissa_core.svd import RESOLUTION, truncated_svd

pytestmark = pytest.mark.usefixtures("one_thread")


@given(
    rank=st.sampled_from([1, 2, 4]),
    above=st.integers(0, 3),
    wider=st.sampled_from([-1, 0, 1, 2, 8]),
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
def test_clusters_about_as_wide_as_a_block(
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
    assert missed <= said <= tolerance + 4 * RESOLUTION
