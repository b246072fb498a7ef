"""Properties that hold for every matrix, on small ones that hypothesis makes up."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import missed_energy
from torch import Tensor

from pissa_core.spec import SvdConfig
from pissa_core.split import split_principal
from pissa_core.svd import RESOLUTION, truncated_svd

pytestmark = pytest.mark.usefixtures("one_thread")
fixed = settings(deadline=None, derandomize=True, max_examples=120)
EPS = torch.finfo(torch.float32).eps


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Draw a matrix of few shapes of numbers: small integers, dyadic scales, zero blocks."""
    m, n = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["normal", "integers", "sparse", "low rank", "graded", "constant"]))
    W = torch.randn(m, n, generator=generator)
    if kind == "integers":
        W = (3 * W).round()
    elif kind == "sparse":
        W = W * (torch.rand(m, n, generator=generator) < 0.1)
    elif kind == "low rank":
        k = draw(st.integers(0, min(m, n)))
        W = W[:, :k] @ torch.randn(k, n, generator=generator)
    elif kind == "graded":
        W = W * torch.logspace(0, -8, n)
    elif kind == "constant":
        W = torch.full((m, n), float(W[0, 0]))
    W = W * 2.0 ** draw(st.sampled_from([0, 0, 0, -60, 60, -120, 110]))
    return W.t().contiguous().t() if draw(st.booleans()) else W


@fixed
@given(W=matrices(), data=st.data())
def test_every_split_keeps_its_promises(W: Tensor, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(W.shape)))
    method = data.draw(st.sampled_from(["auto", "exact", "lowrank"]))
    scaling = data.draw(st.sampled_from([0.25, 1.0, 2.0, 3.7]))
    done = split_principal(
        W,
        rank,
        scaling=scaling,
        svd=SvdConfig(method=method, niter=1),
        seed=data.draw(st.integers(0, 9)),
        rounding="faithful",
        adapter_dtype=torch.float32,
    )
    m, n = W.shape
    assert (done.B.shape, done.A.shape, done.R.shape) == ((m, rank), (rank, n), (m, n))
    assert done.R.stride() == W.stride()
    exact = W.double()
    rest = exact - done.R.double() - scaling * done.B.double() @ done.A.double()
    size = float(exact.norm())
    assert float(rest.norm()) <= 30 * EPS * size
    said = done.certificate
    assert all(math.isfinite(v) for v in said.as_row().values() if isinstance(v, float))
    assert 0 <= said.energy <= 1
    assert 0 <= said.missed <= 1
    assert said.orthogonality < 1e-5
    truth = torch.linalg.svdvals(exact)
    assert list(said.sigma) == sorted(said.sigma, reverse=True)
    # Interlacing: no subspace holds more than the best one.
    for sigma, best in zip(said.sigma, truth.tolist(), strict=False):
        assert sigma <= best + 30 * EPS * float(truth[0])
    peaks = done.B.gather(0, done.B.abs().argmax(dim=0, keepdim=True))
    assert (peaks >= 0).all()


@fixed
@given(W=matrices(), data=st.data())
def test_no_certificate_is_false_and_auto_delivers(W: Tensor, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(W.shape)))
    method = data.draw(st.sampled_from(["auto", "lowrank"]))
    tolerance = data.draw(st.sampled_from([0.1, 1e-3, 1e-5]))
    found = truncated_svd(W, rank, method=method, tolerance=tolerance, niter=1, seed=1)
    missed = missed_energy(W, found.U, found.S, found.Vt)
    captured = float(found.S.double().square().sum())
    certified = 1 - captured / found.optimum + RESOLUTION if found.optimum else 0.0
    assert missed <= certified
    if method == "auto":
        assert missed <= tolerance


@fixed
@given(W=matrices(), exponent=st.integers(-20, 20))
def test_a_power_of_two_passes_through_exactly(W: Tensor, exponent: int) -> None:
    # Within the range where nothing is rescaled, every operation scales exactly.
    size = float(W.double().norm())
    if not 2.0**-8 < size < 2.0**8:
        return
    wishes = {"method": "auto", "tolerance": 1e-4, "niter": 0, "seed": 3}
    one = truncated_svd(W, 1, **wishes)  # type: ignore[arg-type]
    other = truncated_svd(W * 2.0**exponent, 1, **wishes)  # type: ignore[arg-type]
    torch.testing.assert_close(other.S, one.S * 2.0**exponent, rtol=1e-5, atol=0)
