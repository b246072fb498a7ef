"""`auto` delivers its tolerance, and no certificate is false, on spectra chosen to be hard."""

from __future__ import annotations

import pytest
import torch
from spectra import SPECTRA, best_energy, missed_energy

from pissa_core.certify import certify
from pissa_core.svd import RESOLUTION, TruncatedSvd, truncated_svd
from pissa_core.svd.krylov import leading_eigenpairs
from pissa_core.svd.missing import may_hide_members
from pissa_core.svd.narrow import fits_narrow
from pissa_core.svd.orth import orthonormal_rows
from pissa_core.svd.routes import krylov_shape

pytestmark = pytest.mark.usefixtures("one_thread", "bfloat16_products")

ALIKE = [1 - 0.001 * i for i in range(10)]
SHAPES = [(420, 300), (300, 420), (180, 1000)]


def solve(W: torch.Tensor, rank: int, method: str = "auto", **wishes: object) -> TruncatedSvd:
    given = {"tolerance": 1e-4, "niter": 2, "seed": 3} | wishes
    return truncated_svd(W, rank, method=method, **given)  # type: ignore[arg-type]


def certified(W: torch.Tensor, found: TruncatedSvd) -> float:
    """Return `missed` of the certificate."""
    return certify(found, torch.zeros_like(found.S), 0.0).missed


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_auto_delivers_and_certifies(
    spectrum: str, dtype: torch.dtype, rank: int, m: int, n: int
) -> None:
    W = SPECTRA[spectrum](m, n, rank).to(dtype)
    best = best_energy(W, rank)
    for tolerance in (1e-2, 1e-4, 1e-5):
        found = solve(W, rank, tolerance=tolerance)
        missed = missed_energy(W, found.U, found.S, found.Vt, best=best)
        assert missed <= tolerance
        assert missed <= certified(W, found) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tolerance", [2e-5, 1e-3])
@pytest.mark.parametrize("spectrum", ["heavy tail over a bulk", "flat bulk", "repeated at the cut"])
def test_a_wide_block_that_restarts(spectrum: str, tolerance: float, dtype: torch.dtype) -> None:
    assert not fits_narrow(740, 64)
    W = SPECTRA[spectrum](800, 740, 64).to(dtype)
    found = solve(W, 64, tolerance=tolerance)
    assert found.method in {"krylov", "gram-krylov"}
    said = certified(W, found)
    assert missed_energy(W, found.U, found.S, found.Vt) <= said <= tolerance


@pytest.mark.parametrize("niter", [0, 1, 4])
@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_certificate_of_lowrank_is_not_false(spectrum: str, rank: int, niter: int) -> None:
    for m, n in ((200, 150), (120, 300)):
        W = SPECTRA[spectrum](m, n, rank).float()
        found = solve(W, rank, "lowrank", niter=niter)
        assert missed_energy(W, found.U, found.S, found.Vt) <= certified(W, found)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_exact_is_exact(spectrum: str) -> None:
    W = SPECTRA[spectrum](300, 200, 16).float()
    found = solve(W, 16, "exact")
    assert missed_energy(W, found.U, found.S, found.Vt) <= RESOLUTION
    assert certified(W, found) <= 2 * RESOLUTION


@pytest.mark.parametrize("seed", range(8))
def test_no_seed_is_unlucky(seed: int) -> None:
    for spectrum in ("flat bulk", "spikes over a bulk", "repeated at the cut", "one outlier"):
        W = SPECTRA[spectrum](340, 300, 4).float()
        for rank in (1, 4):
            found = solve(W, rank, seed=seed)
            missed = missed_energy(W, found.U, found.S, found.Vt)
            assert missed <= certified(W, found) <= 1e-4


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 37), (37, 1), (5, 3), (2, 2000), (2000, 2), (64, 64)]
)
@pytest.mark.parametrize("method", ["auto", "exact", "lowrank"])
def test_every_rank_of_small_and_narrow_shapes(shape: tuple[int, int], method: str) -> None:
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(shape, generator=generator)
    for rank in {1, min(shape) // 2 or 1, min(shape)}:
        found = solve(W, rank, method)
        missed = missed_energy(W, found.U, found.S, found.Vt)
        assert missed <= certified(W, found)
        if method != "lowrank" or rank == min(shape):
            assert missed <= 1e-4
        eye = torch.eye(rank)
        torch.testing.assert_close(found.U.T @ found.U, eye, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.Vt @ found.Vt.T, eye, atol=1e-5, rtol=0)
        assert (found.S >= 0).all()
        assert (found.S.diff() <= 0).all()


@pytest.mark.parametrize("exponent", [-130, -100, -40, 40, 100])
@pytest.mark.parametrize("method", ["auto", "lowrank", "exact"])
def test_a_power_of_two_changes_nothing(exponent: int, method: str) -> None:
    W = SPECTRA["heavy tail over a bulk"](500, 420, 4).float()
    scale = torch.tensor(2.0, dtype=torch.float64).pow(exponent)
    scaled = (W.double() * scale).float()
    plain, found = solve(W, 4, method), solve(scaled, 4, method)
    torch.testing.assert_close(found.S.double() / scale, plain.S.double(), rtol=2e-5, atol=0)
    assert missed_energy(scaled, found.U, found.S, found.Vt) <= certified(scaled, found)
    assert found.norm / float(scale) == pytest.approx(plain.norm, rel=1e-5)


@pytest.mark.parametrize("exponent", [-40, -20, -9, 13, 20, 29, 40])
def test_a_power_of_two_changes_nothing_where_products_are_squared(exponent: int) -> None:
    # The rows of a product with (W^T W - c)^2 are as long as sigma_1^4, and are squared again.
    W = SPECTRA["slow decay"](800, 740, 44).float()
    scale = 2.0**exponent
    plain, found = solve(W, 44), solve(W * scale, 44)
    torch.testing.assert_close(found.S / scale, plain.S, rtol=2e-5, atol=0)
    assert missed_energy(W * scale, found.U, found.S, found.Vt) <= certified(W * scale, found)
    assert certified(W * scale, found) <= 1e-4


@pytest.mark.parametrize("magnitude", [1e-30, 1e30, 1e36, 1e-42])
def test_magnitudes_at_the_ends_of_float32(magnitude: float) -> None:
    signs = torch.randn(400, 420, generator=torch.Generator().manual_seed(2)).sign()
    W = signs * magnitude
    found = solve(W, 4)
    assert torch.isfinite(found.S).all()
    assert missed_energy(W, found.U, found.S, found.Vt) <= certified(W, found) <= 1e-4


@pytest.mark.parametrize("method", ["auto", "exact", "lowrank"])
def test_the_zero_matrix_has_nothing_to_miss(method: str) -> None:
    found = solve(torch.zeros(300, 250), 7, method)
    assert torch.equal(found.S, torch.zeros(7))
    torch.testing.assert_close(found.U.T @ found.U, torch.eye(7), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.Vt @ found.Vt.T, torch.eye(7), atol=1e-5, rtol=0)
    row = certify(found, torch.zeros(7), 0.0).as_row()
    assert row["energy"] == row["missed"] == row["sigma_error"] == row["recombination_error"] == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["auto", "exact", "lowrank"])
def test_entries_that_are_not_finite_are_not_decomposed(bad: float, method: str) -> None:
    W = torch.ones(40, 30)
    W[17, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        solve(W, 2, method)


def test_a_tolerance_that_float32_cannot_show_is_met_by_the_exact_method() -> None:
    assert solve(torch.randn(30, 20), 3, tolerance=1e-6).method == "exact"


@pytest.mark.parametrize("seed", range(12))
def test_a_member_of_a_cluster_that_the_start_all_but_lacks_is_not_certified_away(
    seed: int,
) -> None:
    # One member more than the block is wide, and a start that hardly holds the second largest:
    # after three steps the residuals say that the cluster is settled, when it is not.
    rank, d = 4, 300
    shape = krylov_shape(d, rank)
    theta = torch.full((d,), 0.25, dtype=torch.float64)
    members = torch.linspace(1, 0, shape.block + 1, dtype=torch.float64)
    theta[: shape.block + 1] = 1 + 1e-4 * members
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(shape.block, d, generator=generator)
    start[:, 1] *= 0.01
    G = torch.diag(theta).float()
    found = leading_eigenpairs(
        lambda X: X @ G,
        orthonormal_rows(start, generator)[0],
        rank,
        shape,
        tolerance=1e-2,
        generator=generator,
    )
    missed = 1 - float(found.values[:rank].sum() / theta[:rank].sum())
    assert missed <= found.missed + RESOLUTION


@pytest.mark.parametrize(
    ("values", "hides"),
    [
        ([*ALIKE, 0.3, 0.2], True),  # as many alike as the block is wide
        ([9.0, *ALIKE, 0.3], True),  # one apart above them
        ([0.8**i for i in range(14)], False),
        ([1 - 0.01 * i for i in range(14)], False),
        ([1.0, 1.0, *(8 * [0.0]), 1e-9, 0.0], False),  # of rank 2: noise below is no drop
    ],
)
def test_where_members_may_hide(values: list[float], hides: bool) -> None:
    assert may_hide_members(torch.tensor(values, dtype=torch.float64), 2, 10) is hides
