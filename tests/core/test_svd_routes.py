"""Each route is taken where it should be, and agrees with the slow obvious one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from spectra import SPECTRA, bulk, missed_energy, with_spectrum

from pissa_core.svd import truncated_svd
from pissa_core.svd.krylov import leading_eigenpairs, random_start
from pissa_core.svd.operator import Operator, operator_of, scale_
from pissa_core.svd.orth import orthonormal_rows, split_off
from pissa_core.svd.products import times_transposed
from pissa_core.svd.routes import Products, krylov_shape
from pissa_core.svd.truncated import _refined

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = torch.finfo(torch.float32).eps


def layouts() -> list[torch.Tensor]:
    """Tall, wide and square; by rows, by columns, by neither; every dtype; several panels."""
    made = []
    for m, n in ((1300, 520), (520, 1300), (300, 300), (1, 9), (9, 1)):
        W = bulk(m, n).float()
        made += [W, W.bfloat16(), W.half(), W.t(), W.bfloat16().t(), W[:, ::2], W.repeat(2, 2)[:m]]
    return made


@pytest.mark.parametrize("W", layouts(), ids=lambda W: f"{tuple(W.shape)}{W.stride()}{W.dtype}")
@pytest.mark.parametrize("exponent", [0, 3, -130])
def test_the_operator_is_w(W: torch.Tensor, exponent: int) -> None:
    # Up to 2^120 where the dtype reaches, so that only the scaled matrix has squares in float32.
    W = W * (2.0**120 if exponent < 0 and W.dtype != torch.float16 else 1.0)
    exponent = -10 if exponent < 0 and W.dtype == torch.float16 else exponent
    operator = Operator(W, exponent)
    M = (W.double() if W.shape[0] >= W.shape[1] else W.double().t()) * 2.0**exponent
    X = torch.randn(5, operator.short, generator=torch.Generator().manual_seed(0))
    size = float(M.norm())
    # A dot product of length k errs by at most k eps |x| |y|; sqrt(k) is what happens.
    allowed = 4 * EPS * M.shape[0] ** 0.5
    for got, want, scale in (
        (operator.apply(X), X.double() @ M.t() @ M, size**2),
        (operator.lift(X), X.double() @ M.t(), size),
        (operator.gram(), M.t() @ M, size**2),
    ):
        assert got.dtype == torch.float32
        assert float((got.double() - want).norm()) <= allowed * scale * 5**0.5
    assert operator.norm() == pytest.approx(size, rel=1e-5)


@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("shape", [(1300, 520), (520, 1300), (300, 300), (5, 90)])
@pytest.mark.parametrize("stored", ["by rows", "by columns"])
def test_rough_products_are_rounded_and_no_more(shape: tuple[int, int], stored: str) -> None:
    W = bulk(*shape).bfloat16()
    W = W if stored == "by rows" else W.t().contiguous().t()
    operator = Operator(W)
    assert operator.has_rough_products
    X = torch.randn(5, operator.short, generator=torch.Generator().manual_seed(0))
    for rough, exact in (
        (operator.apply_roughly(X), operator.apply(X)),
        (operator.gram(roughly=True), operator.gram()),
    ):
        assert rough.dtype == torch.float32
        assert 0 < float((rough - exact).norm() / exact.norm()) < 2.0**-8


@pytest.mark.usefixtures("bfloat16_products")
def test_rough_products_are_for_bfloat16_that_needs_no_scaling() -> None:
    W = bulk(50, 40).float()
    assert not Operator(W).has_rough_products
    assert not Operator(W.half()).has_rough_products
    assert not Operator(W.bfloat16(), 3).has_rough_products


def test_images_on_the_shorter_side() -> None:
    for W in (bulk(700, 300).float(), bulk(300, 700).bfloat16(), bulk(300, 700).float().t()):
        operator = Operator(W)
        M = W.double() if W.shape[0] >= W.shape[1] else W.double().t()
        Y = torch.randn(4, operator.long, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(operator.drop(Y).double(), Y.double() @ M, rtol=1e-4, atol=1e-4)


_BOUND = """
import torch
from pissa_core.svd import truncated_svd
W = torch.randn(900, 700, generator=torch.Generator().manual_seed(0)).bfloat16()
found = truncated_svd(W, 4, method="auto", tolerance=1e-2, niter=0, seed=0)
print(found.method, found.residuals is None)
"""


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_where_onednn_is_told_to_leave_instructions_out_no_product_is_rough(name: str) -> None:
    # It has no bfloat16 product of AVX2; torch, asked for the processor, does not know of it.
    said = subprocess.run(
        [sys.executable, "-c", _BOUND],
        env={**os.environ, name: "AVX2"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.split() == ["krylov", "True"]


@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("shape", [(900, 700), (700, 900)])
def test_what_roundings_spoil_is_noticed_and_mended(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rough products a hundred times rougher than bfloat16's: no triplet of theirs may be certified.
    noise = torch.Generator().manual_seed(0)
    plain = Operator.apply_roughly

    def spoilt(self: Operator, X: torch.Tensor) -> torch.Tensor:
        Z = plain(self, X)
        return Z + 0.3 * Z.norm() / Z.numel() ** 0.5 * torch.randn(Z.shape, generator=noise)

    W = SPECTRA["heavy tail over a bulk"](*shape, 8).bfloat16()
    good = truncated_svd(W, 8, method="auto", tolerance=1e-3, niter=0, seed=0)
    monkeypatch.setattr(Operator, "apply_roughly", spoilt)
    found = truncated_svd(W, 8, method="auto", tolerance=1e-3, niter=0, seed=0)
    assert good.residuals is not None
    assert found.residuals is None
    assert missed_energy(W, found.U, found.S, found.Vt) <= 1e-3


@pytest.mark.parametrize("missed", [0.5, 1.0, 2.5])
def test_what_misses_too_much_is_not_refined(missed: float) -> None:
    # Out of patience the two shares may come to all there is, and more.
    operator, norm = operator_of(bulk(900, 700).bfloat16())
    generator = torch.Generator().manual_seed(0)
    shape = krylov_shape(700, 4)
    start = random_start(shape.block, 700, generator, torch.device("cpu"))
    found = leading_eigenpairs(operator.apply, start, 4, shape, tolerance=1e-2, generator=generator)
    assert _refined(operator, norm, found, 4, "krylov", 2e-2) is not None
    assert _refined(operator, norm, replace(found, missed=missed), 4, "krylov", 2e-2) is None


def test_the_product_is_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    for p, k, q in ((1, 1, 1), (3, 7, 5), (16, 300, 64), (0, 4, 3), (4, 0, 3)):
        a, b = torch.randn(p, k, generator=generator), torch.randn(q, k, generator=generator)
        want = a.double() @ b.double().t()
        torch.testing.assert_close(times_transposed(a, b).double(), want, rtol=1e-4, atol=1e-4)
        transposed = b.t().contiguous().t()
        torch.testing.assert_close(
            times_transposed(a, transposed).double(), want, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unaligned_matrix_gives_the_bytes_of_an_aligned_one(dtype: torch.dtype) -> None:
    W = bulk(600, 400).to(dtype)
    memory = torch.empty(W.numel() + 1, dtype=dtype)
    shifted = memory[1:].view(600, 400).copy_(W)
    assert shifted.data_ptr() % 64 != W.data_ptr() % 64
    wishes = {"method": "auto", "tolerance": 1e-4, "niter": 0, "seed": 0}
    one, other = truncated_svd(W, 4, **wishes), truncated_svd(shifted, 4, **wishes)  # type: ignore[arg-type]
    assert torch.equal(one.U, other.U)
    assert torch.equal(one.Vt, other.Vt)


@pytest.mark.parametrize("exponent", [-300, -149, -1, 0, 1, 100, 127, 200])
def test_scaling_by_a_power_of_two_is_exact(exponent: int) -> None:
    T = torch.tensor([1.0, -1.5, 3.25]) * 2.0 ** (-100 if exponent > 0 else 100)
    want = (T.double() * 2.0**exponent).float()
    assert torch.equal(scale_(T.clone(), exponent), want)


def test_the_operator_scales_only_where_squares_would_leave_float32() -> None:
    assert operator_of(torch.ones(3, 3))[0].exponent == 0
    for magnitude in (1e30, 1e-30, 1e-44):
        operator, norm = operator_of(torch.full((3, 3), magnitude))
        assert operator.exponent != 0
        assert 1.5 <= norm <= 3.0
    assert operator_of(torch.zeros(3, 3))[1] == 0.0


@pytest.mark.parametrize(
    "rows",
    ["generic", "dependent", "zero", "graded", "nearly dependent"],
)
def test_rows_become_orthonormal_and_the_factor_gives_them_back(rows: str) -> None:
    generator = torch.Generator().manual_seed(4)
    Y = torch.randn(12, 200, generator=generator)
    if rows == "dependent":
        Y[5:] = Y[:7] * 2
    elif rows == "zero":
        Y[3:9] = 0
    elif rows == "graded":
        Y *= torch.logspace(0, -25, 12)[:, None]
    elif rows == "nearly dependent":
        Y = Y[:1] + 1e-6 * Y
    Q, L = orthonormal_rows(Y, generator)
    assert float((Q @ Q.t() - torch.eye(12)).abs().max()) < 20 * EPS
    assert float((L @ Q.double() - Y.double()).norm()) < 20 * EPS * float(Y.norm())


def test_what_is_split_off_is_orthogonal_to_the_basis_even_if_almost_nothing_is_left() -> None:
    generator = torch.Generator().manual_seed(4)
    K, _ = orthonormal_rows(torch.randn(150, 200, generator=generator), generator)
    inside = torch.randn(20, 150, generator=generator) @ K
    for rest in (1.0, 1e-3, 1e-6, 0.0):
        Y = inside + rest * torch.randn(20, 200, generator=generator)
        C, Q, B = split_off(K, Y, generator)
        assert float((Q @ K.t()).abs().max()) < 20 * EPS
        assert float((Q @ Q.t() - torch.eye(20)).abs().max()) < 20 * EPS
        back = C.double() @ K.double() + B @ Q.double()
        assert float((back - Y.double()).norm()) < 20 * EPS * float(Y.norm())


def test_a_krylov_space_that_is_exhausted_stays_orthonormal() -> None:
    # Three eigenvalues: after three steps nothing but rounding is left to extend the basis with.
    sigma = torch.full((289,), 0.5)
    sigma[:9], sigma[:5] = 1.0, 2.0
    for seed in range(12):
        W = with_spectrum(sigma, 289, 289, seed).float()
        found = truncated_svd(W, 2, method="auto", tolerance=1e-3, niter=0, seed=seed)
        assert float((found.Vt @ found.Vt.T - torch.eye(2)).abs().max()) < 20 * EPS
        assert float(found.S.double().square().sum()) == pytest.approx(8.0, rel=1e-5)


@pytest.mark.parametrize(
    ("m", "n", "rank", "spectrum", "method"),
    [
        (1500, 900, 4, "heavy tail over a bulk", "krylov"),
        (2000, 600, 24, "heavy tail over a bulk", "gram-krylov"),
        (500, 300, 4, "flat bulk", "gram-krylov"),
        (400, 300, 40, "flat bulk", "gram"),
    ],
)
def test_the_shape_and_the_spectrum_choose_the_route(
    m: int, n: int, rank: int, spectrum: str, method: str
) -> None:
    W = SPECTRA[spectrum](m, n, rank).bfloat16()
    found = truncated_svd(W, rank, method="auto", tolerance=1e-4, niter=0, seed=0)
    assert found.method == method
    assert missed_energy(W, found.U, found.S, found.Vt) <= 1e-4


def test_both_sources_of_products_agree() -> None:
    operator = Operator(bulk(500, 300))
    X = torch.randn(9, 300, generator=torch.Generator().manual_seed(0))
    from_w, from_gram = Products(operator), Products(operator, gram=operator.gram())
    torch.testing.assert_close(from_w.apply(X), from_gram.apply(X), rtol=1e-4, atol=1e-6)
    for _ in range(40):
        from_w.apply(X)
    assert from_w.gram is not None


@pytest.mark.parametrize("shape", [(90, 40), (40, 90), (50, 50), (1, 30), (30, 1)])
@pytest.mark.parametrize("niter", [0, 1, 4])
def test_lowrank_is_torch_svd_lowrank_bit_for_bit(shape: tuple[int, int], niter: int) -> None:
    W = bulk(*shape).float()
    rank = min(6, *shape)
    for seed in (0, 77):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            U, S, V = torch.svd_lowrank(W, q=rank, niter=niter)
        found = truncated_svd(W, rank, method="lowrank", tolerance=0.5, niter=niter, seed=seed)
        assert torch.equal(found.U, U)
        assert torch.equal(found.S, S)
        assert torch.equal(found.Vt, V.mT)


def test_nobody_touches_the_global_generator() -> None:
    before = torch.random.get_rng_state()
    for method in ("auto", "lowrank", "exact"):
        truncated_svd(bulk(500, 450), 4, method=method, tolerance=1e-3, niter=1, seed=1)
        truncated_svd(torch.zeros(50, 40), 4, method=method, tolerance=1e-3, niter=1, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
