"""The best low-rank form of an update that is given as the difference of two products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Compressed:
    """ΔW ≈ left @ right, the best there is of its rank.

    Attributes:
        left: (m, k), float64; the columns are orthogonal, of norm √σ.
        right: (k, n), float64; the rows are orthogonal, of norm √σ.
        sigma: (k,), the singular values kept.
        lost: Σσ² of those that are not, over Σσ² of all; 0 for an update that is zero.
    """

    left: Tensor
    right: Tensor
    sigma: Tensor
    lost: float


def compress(
    B: Tensor,
    A: Tensor,
    B0: Tensor,
    A0: Tensor,
    *,
    scaling: float,
    rank: int,
    tolerance: float | None = None,
) -> Compressed:
    """Find the best approximation of ΔW = scaling · (B A − B₀ A₀) of at most a rank.

    With M = [B − B₀, B₀] and N = [A; A − A₀], ΔW = scaling · M N. Thin QRs M = Q R and Nᵀ = P S
    leave the 2r × 2r core scaling · R Sᵀ, whose SVD gives that of ΔW, which is never formed.
    Written so, ΔW of a short training keeps its own relative precision: B A − B₀ A₀ would be a
    small difference of large products.

    Shapes   B, B0 (m, r); A, A0 (r, n); left (m, k); right (k, n).
    Dtype    float16, bfloat16, float32 in; everything in float64, and out.
    Error    ‖ΔW − left·right‖_F² = Σ_{j>k} σ_j² = lost · Σσ², and no matrix of rank k does
             better (Eckart-Young); on top float64's rounding, some 1e-15 of ‖M‖ ‖N‖.
    Rank     k = rank, or the smallest k with Σ_{j>k} σ_j² ≤ tolerance · Σσ² if that is less;
             never more than min(2r, m, n), never less than 1.
    Sign     the largest |entry| of each column of left is positive; ties go to the lowest row.
    Cost     O((m + n) r²) flops, O((m + n) r) memory.
    Source   QR of both factors, then an SVD of the core: Bebendorf 2008, Hierarchical Matrices,
             §1.1.4 (recompression).
    """
    b0, a = B0.double(), A.double()
    m_factor = torch.cat([B.double() - b0, b0], dim=1)
    n_factor = torch.cat([a, a - A0.double()], dim=0)
    Q, R = torch.linalg.qr(m_factor)
    P, S = torch.linalg.qr(n_factor.t())
    U, sigma, Vt = torch.linalg.svd(scaling * (R @ S.t()))
    tails = _tails(sigma)
    k = _kept(tails, min(rank, len(sigma)), tolerance)
    lost = float(tails[k] / tails[0]) if tails[0] > 0 else 0.0
    root = sigma[:k].sqrt()
    left = (Q @ U[:, :k]) * root
    right = root[:, None] * (Vt[:k] @ P.t())
    signs = _signs(left)
    return Compressed(left * signs, right * signs[:, None], sigma[:k], lost)


def _tails(sigma: Tensor) -> Tensor:
    """Return Σ_{j≥k} σ_j² for k = 0 … len(sigma), summed from the smallest on."""
    squares = (sigma * sigma).flip(0)
    return torch.cat([squares.new_zeros(1), squares.cumsum(0)]).flip(0)


def _kept(tails: Tensor, most: int, tolerance: float | None) -> int:
    if tolerance is None:
        return most
    enough = (tails <= tolerance * tails[0]).nonzero()
    return max(min(int(enough[0, 0]), most), 1)


def _signs(left: Tensor) -> Tensor:
    magnitudes = left.abs()
    first = (magnitudes == magnitudes.amax(0)).to(torch.uint8).argmax(0, keepdim=True)
    signs: Tensor = torch.where(left.gather(0, first)[0] < 0, -1.0, 1.0).to(left.dtype)
    return signs
