"""Orthonormal rows, by Cholesky QR twice; Householder where Cholesky gives up."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from pissa_core.svd.products import times, times_transposed

_TINY = torch.finfo(torch.float32).tiny
NARROW = 32
"""Rows of a block below which `split_off` compiles no kernel for each size it meets."""
_HALF = 0.5
_MOST_ROUNDS = 6
_STEEP = 1e-3  # a Cholesky pivot below this: a second round would not mend the first


def orthonormal_rows(Y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Factor Y = L Q with Q of orthonormal rows.

    Shapes   Y, Q (b, d), b <= d; L (b, b).
    Dtype    float32; the b x b factors and L are float64.
    Error    ||Q Q^T - I|| of the order of float32 eps: rows are scaled to length 1 first, and two
             rounds suffice while their condition number is below eps^(-1/2), which the smallest
             Cholesky pivot is asked for; otherwise Householder QR, which needs no such thing.
    Random   rows that are zero, or depend on others, get directions drawn from `generator`.
    Source   Fukaya, Nakatsukasa, Yanagisawa, Yamamoto 2014, doi:10.1109/ScalA.2014.11
             (CholeskyQR2).
    """
    Q, L, _ = _cholesky_round(Y, generator)
    for _ in range(_MOST_ROUNDS):
        Q, again, kept = _cholesky_round(Q, generator)
        L = L @ again
        if kept > _HALF:
            break
    return Q, L


def split_off(
    K: Tensor, Y: Tensor, generator: Generator, near: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Split Y = C K + B Q: its part in the row space of K, and an orthonormal rest.

    `near`: rows of K, where Y has no part in the others but for rounding, as in a recurrence of
    Lanczos. Then C is (b, len(near)), and the first half asks those alone.

    Shapes   K (k, d), rows orthonormal or zero; Y, Q (b, d); C (b, k); B (b, b) float64. The
             rows of K that are not zero and those of Y are together at most d.
    Error    ||Q K^T|| and ||Q Q^T - I|| of the order of float32 eps. Both halves are done twice,
             taking turns. Once is not enough, though each step alone would look harmless: the
             defects multiply from step to step, and Ritz values pass the true ones. Rounds go on
             while the last one had to stretch a row twofold, as happens where Y lies in K's row
             space and what is left is rounding.
    Source   Giraud, Langou, Rozloznik, van den Eshof 2005, doi:10.1007/s00211-005-0615-4 ("twice
             is enough"); blocks: Barlow, Smoktunowicz 2013, doi:10.1007/s00211-012-0496-2.
    """
    # Narrow blocks take so little time that a compiled kernel for each size would cost more.
    narrow = len(Y) < NARROW
    multiply_transposed = _plain_transposed if narrow else times_transposed
    multiply = torch.mm if narrow else times
    first = K if near is None else near
    C = multiply_transposed(Y, first)
    Q, B, _ = _cholesky_round(Y - multiply(C, first), generator)
    for _ in range(_MOST_ROUNDS):
        Q.sub_(multiply(multiply_transposed(Q, K), K))
        Q, again, kept = _cholesky_round(Q, generator)
        B = B @ again
        if kept > _HALF:
            break
    return C, Q, B


def _plain_transposed(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b.t())


def _cholesky_round(Y: Tensor, generator: Generator) -> tuple[Tensor, Tensor, float]:
    """Make the rows of Y more orthonormal; also tell the least share of a row that was kept."""
    lengths = torch.linalg.vector_norm(Y, dim=1).clamp(min=_TINY)
    Q = Y / lengths[:, None]
    factor, info = torch.linalg.cholesky_ex(times_transposed(Q, Q).double())
    pivots = factor.diagonal()
    # One answer from the device for three questions.
    told = torch.stack([info.double(), pivots.min(), (pivots * lengths).min()])
    failed, steepest, kept = told.tolist()
    if failed or steepest < _STEEP:
        return *_householder(Y, generator), 0.0
    identity = torch.eye(len(Y), dtype=torch.float64, device=Y.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    return times(inverse.float(), Q), lengths.double()[:, None] * factor, kept


def _householder(Y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    # Noise far below what the rows hold gives the dependent ones a generic direction, where
    # Householder's own completion would be unit vectors, the same for every matrix.
    largest = torch.linalg.vector_norm(Y, dim=1).max().clamp(min=_TINY * 1e9)
    noise = torch.randn(Y.shape, generator=generator).to(Y.device)
    Q, R = torch.linalg.qr((Y + noise * (largest * 1e-8)).t())
    return Q.t().contiguous(), R.t().double()
