"""Every figure of a certificate, held against float64 truth."""

from __future__ import annotations

import json

import pytest
import torch
from spectra import SPECTRA, missed_energy

from pissa_core.certify import Certificate, certify
from pissa_core.spec import SvdConfig
from pissa_core.split import split_principal
from pissa_core.svd import truncated_svd

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("method", ["auto", "lowrank", "exact"])
@pytest.mark.parametrize("m_n", [(400, 300), (300, 400)])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_no_figure_is_false(spectrum: str, m_n: tuple[int, int], method: str, layout: str) -> None:
    W = SPECTRA[spectrum](*m_n, 8).bfloat16()
    W = W if layout == "rows" else W.t().contiguous().t()
    config = SvdConfig(method=method, niter=1)  # type: ignore[arg-type]
    done = split_principal(
        W, 8, scaling=1.0, svd=config, seed=0, rounding="faithful", adapter_dtype=torch.float32
    )
    said, exact = done.certificate, W.double()
    truth = torch.linalg.svdvals(exact)
    total = float(exact.square().sum())
    captured = float((exact - done.B.double() @ done.A.double()).square().sum())
    assert said.energy == pytest.approx(1 - captured / total, rel=1e-5, abs=1e-5)
    best = float(truth[:8].square().sum())
    assert (best - (total - captured)) / best <= said.missed
    # Weyl: a singular value lies within the residual of each sigma, float32 aside.
    for sigma, error in zip(said.sigma, said.sigma_error, strict=True):
        nearest = float((truth - sigma).abs().min())
        assert nearest <= error + 20 * EPS * float(truth[0])
    assert 0 <= said.orthogonality < 100 * EPS


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("method", ["auto", "lowrank", "exact"])
@pytest.mark.parametrize("m_n", [(400, 300), (300, 400)])
def test_the_error_of_sigma_is_the_residual(
    m_n: tuple[int, int], method: str, by_rows: bool
) -> None:
    W = SPECTRA["flat bulk"](*m_n, 8).float()
    W = W if by_rows else W.t().contiguous().t()
    wishes = {"method": method, "tolerance": 1e-2, "niter": 1, "seed": 0}
    found = truncated_svd(W, 8, **wishes)  # type: ignore[arg-type]
    U, S, V, exact = found.U.double(), found.S.double(), found.Vt.double().t(), W.double()
    right = (exact @ V - U * S).norm(dim=0)
    left = (exact.t() @ U - V * S).norm(dim=0)
    holds, open_side = (right, left) if found.exact_side == "right" else (left, right)
    assert float(holds.max()) < 40 * EPS * float(S[0])
    config = SvdConfig(method=method, tolerance=1e-2, niter=1)  # type: ignore[arg-type]
    for rounding in ("faithful", "peft"):
        said = split_principal(
            W, 8, scaling=1.0, svd=config, seed=0, rounding=rounding, adapter_dtype=torch.float32
        ).certificate
        torch.testing.assert_close(
            torch.tensor(said.sigma_error, dtype=torch.float64), open_side, rtol=1e-3, atol=1e-5
        )


def test_a_row_is_json_and_small() -> None:
    certificate = Certificate((2.0, 1.0), 0.5, 1e-5, (0.1, 0.4), 1e-7, 1e-3, "krylov")
    row = certificate.as_row()
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row["sigma"] == [2.0, 1.0]
    assert row["sigma_error"] == 0.2
    assert set(row) >= {"sigma", "energy", "missed", "recombination_error", "method"}


def test_factors_that_are_not_orthonormal_are_found_out() -> None:
    W = SPECTRA["heavy tail over a bulk"](60, 50, 4).float()
    found = truncated_svd(W, 4, method="exact", tolerance=1e-4, niter=0, seed=0)
    found.U[:, 1] += 0.01 * found.U[:, 0]
    assert certify(found, torch.zeros(4), 0.0).orthogonality == pytest.approx(0.01, rel=1e-3)


def test_what_is_found_of_a_wrong_subspace_is_certified_as_missing() -> None:
    W = SPECTRA["fast decay"](300, 260, 4).float()
    good = truncated_svd(W, 4, method="exact", tolerance=1e-4, niter=0, seed=0)
    poor = truncated_svd(W, 4, method="lowrank", tolerance=1e-4, niter=0, seed=0)
    missed = missed_energy(W, poor.U, poor.S, poor.Vt)
    assert missed > 1e-2
    assert missed <= certify(poor, torch.zeros(4), 0.0).missed <= 1.5 * missed
    assert certify(good, torch.zeros(4), 0.0).missed <= 8e-6
