"""One door to the truncated SVD: the method by name, the result with what certifies it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from pissa_core.svd import dense
from pissa_core.svd.krylov import (
    Ritz,
    Shape,
    leading_eigenpairs,
    random_start,
    solve_small,
)
from pissa_core.svd.missing import RESOLUTION, could_be_missing
from pissa_core.svd.narrow import few_eigenpairs, fits_narrow
from pissa_core.svd.operator import Operator, operator_of, scale_
from pissa_core.svd.orth import orthonormal_rows
from pissa_core.svd.routes import (
    NOISE,
    ROOM,
    Products,
    fits_krylov,
    krylov_shape,
    oversampling,
    products_for_few,
)

# Steps of block Krylov from lowrank's own result that show what it missed.
_STEPS_TO_CERTIFY = 4


@dataclass(frozen=True, slots=True)
class TruncatedSvd:
    """The r leading singular triplets of W, W ~ U diag(S) Vt, and what certifies them.

    Attributes:
        U: (m, r) float32, orthonormal columns.
        S: (r,) float32, descending, not negative.
        Vt: (r, n) float32, orthonormal rows.
        method: the route taken: ``exact``, ``lowrank``, ``gram`` (eigenvectors of all of the
            smaller Gram matrix), ``krylov`` (on W) or ``gram-krylov`` (on the Gram matrix).
        norm: ||W||_F.
        optimum: upper estimate of the sum of the r largest sigma^2; see `svd.missing`.
        exact_side: the side on which the triplets hold to rounding, ``right`` if W Vt^T = U S,
            ``left`` if U^T W = S Vt; the other side's residual bounds the error of S.
        residuals: (r,) norms of the other side's residuals, where they were needed anyway.
    """

    U: Tensor
    S: Tensor
    Vt: Tensor
    method: str
    norm: float
    optimum: float
    exact_side: str
    residuals: Tensor | None = None


def truncated_svd(
    W: Tensor, rank: int, *, method: str, tolerance: float, niter: int, seed: int
) -> TruncatedSvd:
    """Find the `rank` leading singular triplets of W.

    Shapes   W (m, n), m = out_features as PEFT multiplies it, rows or columns contiguous; U (m, r),
             S (r,), Vt (r, n); 1 <= rank <= min(m, n).
    Dtype    float16, bfloat16, float32 in (converted exactly); arithmetic in float32, scaled by a
             power of two where the squares of W would overflow or vanish; results float32.
    Error    ``exact``: backward stable. ``lowrank``: what `torch.svd_lowrank` gives. ``auto``: the
             share of the optimal energy sum_{i<=r} sigma_i^2 that is missing is at most `tolerance`
             by the estimate of `could_be_missing`, which is no bound, or by `reach`, which is one
             given a ceiling, itself an estimate; RESOLUTION is counted in. Below twice
             RESOLUTION, where float32 sums of squares say nothing, ``auto`` takes ``exact``.
             Single vectors inside a cluster around sigma_r are not determined by this, and need
             not be.
    Sign     as it comes; `split_principal` makes it unique.
    Random   the start, from `seed` alone, drawn on the CPU whatever the device. Same bytes on the
             same kind of device with the same number of BLAS threads, whatever else runs.
    Cost     see `leading_eigenpairs`, `few_eigenpairs`, `dense` and `routes`.
    Source   Musco, Musco 2015, arXiv:1504.05477; Halko, Martinsson, Tropp 2011, arXiv:0909.4061.
    """
    operator, norm = operator_of(W)
    generator = torch.Generator().manual_seed(seed)
    if not math.isfinite(norm):
        raise ValueError("W holds entries that are not finite")
    if method == "exact" or (method == "auto" and tolerance < 2 * RESOLUTION):
        return _exact(W, rank, _unscaled(norm, operator))
    if norm == 0.0:
        return _of_zero(W, rank, method, generator)
    if method == "lowrank":
        return _lowrank(operator, norm, rank, niter, generator)
    return _auto(operator, norm, rank, tolerance, generator)


def _exact(W: Tensor, rank: int, norm: float) -> TruncatedSvd:
    U, S, Vt = dense.exact(W.float(), rank)
    return TruncatedSvd(U, S, Vt, "exact", norm, _energy(S), "right")


def _of_zero(W: Tensor, rank: int, method: str, generator: Generator) -> TruncatedSvd:
    U = random_start(rank, W.shape[0], generator, W.device).t()
    Vt = random_start(rank, W.shape[1], generator, W.device)
    return TruncatedSvd(U, torch.zeros(rank, device=W.device), Vt, method, 0.0, 0.0, "right")


def _lowrank(
    operator: Operator, norm: float, rank: int, niter: int, generator: Generator
) -> TruncatedSvd:
    W = scale_(operator.W.float().clone(), operator.exponent) if operator.exponent else operator.W
    U, S, Vt = dense.lowrank(W.float(), rank, niter, generator)
    del W
    optimum = _optimum_beyond(operator, Vt if operator.tall else U.t(), S, generator)
    return _rescaled(
        operator, U, S, Vt, "lowrank", norm, optimum, "left" if operator.tall else "right"
    )


def _optimum_beyond(operator: Operator, V: Tensor, S: Tensor, generator: Generator) -> float:
    """Estimate from above the optimal energy by going on from V for a few steps.

    Shapes   V (r, d), the vectors of the short side; S (r,).
    Dtype    float32; the small problems float64.
    Error    that of `could_be_missing`; exact to rounding where d is at most five blocks, and all
             eigenvalues of the Gram matrix are taken.
    Random   `oversampling` further vectors to start with.
    Cost     four steps of `leading_eigenpairs`, or the Gram matrix and its eigenvalues.
    Source   as `leading_eigenpairs`.
    """
    rank, d = V.shape
    extra = oversampling(rank)
    block = rank + extra
    if d <= (_STEPS_TO_CERTIFY + 1) * block:
        values, _ = solve_small(operator.gram().double(), rank)
        return float(values[:rank].clamp(min=0).sum())
    fresh = torch.randn(extra, d, generator=generator).to(V.device)
    start, _ = orthonormal_rows(torch.cat([V.float(), fresh]), generator)
    shape = Shape(block, block, _STEPS_TO_CERTIFY * block, _STEPS_TO_CERTIFY)
    found = leading_eigenpairs(
        operator.apply, start, rank, shape, tolerance=0.0, generator=generator
    )
    return max(_energy(S), _optimum(found, rank))


def _auto(
    operator: Operator, norm: float, rank: int, tolerance: float, generator: Generator
) -> TruncatedSvd:
    d, device = operator.short, operator.W.device
    if not fits_krylov(d, rank):
        return _by_gram(operator, norm, rank)
    tolerance -= RESOLUTION  # which every certificate adds
    if fits_narrow(d, rank) and device.type == "cpu":
        few = _by_few(operator, norm, rank, tolerance, generator)
        if few is not None:
            return few
    shape = krylov_shape(d, rank)
    start = random_start(shape.block, d, generator, device)
    if operator.has_rough_products and tolerance >= ROOM * NOISE * rank:
        refined, start = _roughly(operator, norm, rank, tolerance, start, generator)
        if refined is not None:
            return refined
    products = Products(operator)
    found = leading_eigenpairs(
        products.apply, start, rank, shape, tolerance=tolerance, generator=generator
    )
    if not found.missed <= tolerance:
        return _by_gram(operator, norm, rank)  # out of patience; has not been seen to happen
    method, products.gram = products.method, None
    V = found.vectors[:rank]
    return _lifted(operator, norm, V, method, _optimum(found, rank), found.missed)


def _by_few(
    operator: Operator, norm: float, rank: int, tolerance: float, generator: Generator
) -> TruncatedSvd | None:
    """Search by `few_eigenpairs`, with the cheapest products first; None where it gives up."""
    for may_be_rough in (operator.has_rough_products, False):
        products, noise = products_for_few(operator, rank, tolerance, may_be_rough=may_be_rough)
        found = few_eigenpairs(
            products.apply,
            operator.short,
            rank,
            oversampling(rank),
            tolerance=(math.sqrt(tolerance) - math.sqrt(noise)) ** 2,
            generator=generator,
            device=operator.W.device,
            symmetric=products.symmetric,
        )
        method, products.gram = products.method, None
        if found is None:
            return None
        if not products.roughly:
            V = found.vectors[:rank]
            return _lifted(operator, norm, V, method, _optimum(found, rank), found.missed)
        refined = _refined(operator, norm, found, rank, method, tolerance)
        if refined is not None:
            return refined
    return None


def _roughly(
    operator: Operator,
    norm: float,
    rank: int,
    tolerance: float,
    start: Tensor,
    generator: Generator,
) -> tuple[TruncatedSvd | None, Tensor]:
    """Search by rough products; return `_refined` of what is found, and its vectors (b, d)."""
    products = Products(operator, roughly=True)
    aim = (math.sqrt(tolerance) - math.sqrt(NOISE * rank)) ** 2
    shape = krylov_shape(operator.short, rank)
    found = leading_eigenpairs(
        products.apply, start, rank, shape, tolerance=aim, generator=generator
    )
    method, products.gram = products.method, None
    return _refined(operator, norm, found, rank, method, tolerance), found.vectors


def _refined(
    operator: Operator, norm: float, found: Ritz, rank: int, method: str, tolerance: float
) -> TruncatedSvd | None:
    """Turn Ritz vectors of rough products into triplets in float32, if they miss little enough.

    The residuals of the triplets are measured. They are those that the rough products left, of
    which `found.missed` tells, and what rounding added, of which `could_be_missing` tells.

    Shapes   W as `operator` has it, not scaled; found.vectors (b, d), b > rank; triplets as in
             `TruncatedSvd`, residuals (rank,). None where more is missing than `tolerance`.
    Dtype    float32; the small problems float64.
    Error    an estimate, on two hypotheses. What residuals cost is the square of a length, in one
             metric for both parts, so that the roots of the two shares add up at most. And what
             rounding added to Ritz vectors beyond the b kept, which is not measured, does not
             matter beside what it added to these.
    Cost     `_lifted` of b vectors, and one more product with W: 4 D d b flops in all.
    Source   none for the sum of the two; the parts as in `could_be_missing`.
    """
    short, s, long, u = _triplets(operator, found.vectors)
    sizes = s.float()[:, None]
    rest = operator.drop(long).sub_(sizes * short)
    added = rest * sizes - torch.mm(u.t().float(), found.residuals)
    by_rounding = could_be_missing(s.square(), _coordinates(added), rank, len(s), early=True)
    missed = (math.sqrt(found.missed) + math.sqrt(by_rounding)) ** 2
    if not missed <= tolerance:
        return None
    optimum = _energy(s[:rank]) / (1 - missed)
    residuals = torch.linalg.vector_norm(rest[:rank], dim=1)
    S = s[:rank].float()
    U, Vt, side = _sides(operator, short[:rank], long[:rank])
    return TruncatedSvd(U, S, Vt, method, norm, optimum, side, residuals)


def _coordinates(rows: Tensor) -> Tensor:
    """Return rows (b, d) as columns (b, b) in an orthonormal basis of the space they span."""
    squares, E = torch.linalg.eigh(torch.mm(rows, rows.t()).double())
    coordinates: Tensor = squares.clamp(min=0).sqrt()[:, None] * E.t()
    return coordinates


def _by_gram(operator: Operator, norm: float, rank: int) -> TruncatedSvd:
    G = operator.gram()
    values, S = solve_small(G.double() if len(G) <= 512 else G, rank)
    del G
    V = S[:, :rank].t().float().contiguous()
    return _lifted(operator, norm, V, "gram", float(values[:rank].clamp(min=0).sum()))


def _lifted(
    operator: Operator, norm: float, V: Tensor, method: str, optimum: float, missed: float = 0.0
) -> TruncatedSvd:
    """Turn vectors of the short side into triplets of W.

    V M^T = L Q with Q orthonormal and L = u s w^T, so M (u^T V)^T = (w^T Q)^T diag(s).

    Shapes   V (r, d), rows orthonormal to 1e-5; triplets as in `TruncatedSvd`.
    Dtype    float32; L and its SVD float64.
    Error    the captured energy ||M V^T||_F^2 is the sum of S^2, to rounding. It may come out above
             what a Gram matrix said, whose sums are rounded, too; what is `missed` is missed of
             that, then.
    Cost     2 D d r flops, and 4 (D + d) r^2 or so to make rows orthonormal.
    Source   Rayleigh-Ritz: Golub, Van Loan 2013, "Matrix Computations", sec. 8.1 and 10.4.
    """
    short, s, long, _ = _triplets(operator, V)
    U, Vt, side = _sides(operator, short, long)
    optimum = max(optimum, _energy(s) / (1 - missed))
    return _rescaled(operator, U, s.float(), Vt, method, norm, optimum, side)


def _triplets(operator: Operator, V: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return short (r, d), s (r,) float64, long (r, D) and u (r, r) with short = u^T V."""
    generator = torch.Generator().manual_seed(0)  # asked only where rows of M V^T are zero
    V, _ = orthonormal_rows(V, generator)
    Q, L = orthonormal_rows(operator.lift(V), generator)
    u, s, wt = torch.linalg.svd(L)
    return torch.mm(u.t().float(), V), s, torch.mm(wt.float(), Q), u


def _sides(operator: Operator, short: Tensor, long: Tensor) -> tuple[Tensor, Tensor, str]:
    return (long.t(), short, "right") if operator.tall else (short.t(), long, "left")


def _rescaled(
    operator: Operator,
    U: Tensor,
    S: Tensor,
    Vt: Tensor,
    method: str,
    norm: float,
    optimum: float,
    side: str,
) -> TruncatedSvd:
    S = scale_(S.clone(), -operator.exponent)
    optimum = math.ldexp(optimum, -2 * operator.exponent)
    return TruncatedSvd(U, S, Vt, method, _unscaled(norm, operator), optimum, side)


def _unscaled(norm: float, operator: Operator) -> float:
    return math.ldexp(norm, -operator.exponent)


def _optimum(found: Ritz, rank: int) -> float:
    return float(found.values[:rank].clamp(min=0).sum()) / (1 - found.missed)


def _energy(S: Tensor) -> float:
    return float(S.double().square().sum())
