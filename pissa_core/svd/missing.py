"""How much energy the best r triplets could hold beyond what was found."""

from __future__ import annotations

import torch
from torch import Tensor

RESOLUTION = 1e-6  # share of the energy below which float32 sums of squares say nothing
_SAFETY = 2.0
_ROUNDING = 8 * torch.finfo(torch.float32).eps  # of G v, relative to the largest eigenvalue


def could_be_missing(values: Tensor, residuals: Tensor, rank: int) -> float:
    """Estimate from above the share of the optimal energy that r Ritz pairs miss.

    With G v_i = theta_i v_i + r_i on an orthonormal basis, and no eigenvalue of G beyond delta
    outside the h leading Ritz vectors, second-order perturbation of the bordered matrix
    [[Theta, L], [L^T, delta I]] gives for the sum of the r largest eigenvalues at most
    sum theta_i + sum_{i<=r} min(|r_i|^2 / (theta_i - delta), |r_i|).

    Shapes   values (k,) descending, residuals (k,) = |r_i|, k > rank.
    Error    **an estimate, not a bound**: delta is unknown. It is taken as theta_h + |r_h| with
             h = min(2r, k/2) >= r, and the sum is doubled. A start of r + 8 Gaussian vectors sees
             every direction (a direction's share of the start falls below a tenth of its mean
             with probability < 1e-7 for r >= 16), so what delta can hide has not had the steps
             to grow, and does so at the rate by which the residuals are still falling.
             Residuals within float32 rounding of theta_1 count as none; RESOLUTION covers them.
             Measured: never below the truth from the third step on, for all spectra in
             `tests/core/test_svd_tolerance.py`; mostly 3 to 15 times above it.
    Source   the bordered form: Golub and Meurant 2010, "Matrices, Moments and Quadrature with
             Applications", ch. 6 (Gauss-Radau); expansion: Parlett 1998, "The Symmetric
             Eigenvalue Problem", sec. 11.7.
    """
    top = values[:rank].clamp(min=0)
    total = float(top.sum())
    if total == 0.0:
        return 0.0
    head = min(2 * rank, max(rank, len(values) // 2), len(values) - 1)
    delta = values[head] + residuals[head]
    noise = _ROUNDING * top[0]
    rho = (residuals[:rank].square() - noise * noise).clamp(min=0).sqrt()
    gained = gains(top, rho, delta)
    share = _SAFETY * float(gained.sum()) / total
    return share / (1 + share)


def gains(values: Tensor, residuals: Tensor, delta: Tensor) -> Tensor:
    """Return for each pair what its residual could add: min(rho^2 / (theta - delta), rho)."""
    gap = values - delta
    quadratic = residuals * residuals / gap.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(gap > residuals, quadratic, residuals)
