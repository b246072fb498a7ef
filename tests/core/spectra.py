"""Matrices with a chosen spectrum, and what the best rank-r approximation of them holds."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def with_spectrum(sigma: Tensor, m: int, n: int, seed: int = 0) -> Tensor:
    """Return U diag(sigma) V^T (m, n) float64 with random orthonormal U and V."""
    generator = torch.Generator().manual_seed(seed)
    k = len(sigma)
    U = torch.linalg.qr(torch.randn(m, k, dtype=torch.float64, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64, generator=generator)).Q
    return (U * sigma.double()) @ V.T


def bulk(m: int, n: int, seed: int = 0) -> Tensor:
    """Return a Gaussian matrix (m, n) float64 whose largest singular value is near 1."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(m, n, dtype=torch.float64, generator=generator)
    return noise / (math.sqrt(m) + math.sqrt(n))


def _steps(d: int) -> Tensor:
    return torch.arange(1, d + 1, dtype=torch.float64)


def _spikes(m: int, n: int, r: int) -> Tensor:
    # r spikes over a bulk, the smallest 1.001 of the bulk's edge: sigma_r / sigma_{r+1} ~ 1.001.
    noise = bulk(m, n, seed=5)
    U, S, Vt = torch.linalg.svd(noise, full_matrices=False)
    S[:r] = S[r] * 1.001 * torch.logspace(0.7, 0, r, dtype=torch.float64)
    return (U * S) @ Vt


def _repeated(m: int, n: int, r: int) -> Tensor:
    sigma = torch.full((min(m, n),), 0.5, dtype=torch.float64)
    sigma[: r // 2] = 2.0
    sigma[r // 2 : 2 * r] = 1.0
    return with_spectrum(sigma, m, n)


def _outlier(m: int, n: int, r: int) -> Tensor:
    return bulk(m, n) + with_spectrum(torch.tensor([100.0]), m, n)


def _heavy(m: int, n: int, r: int) -> Tensor:
    return bulk(m, n) + with_spectrum(8 * _steps(min(m, n, 4 * r)) ** -0.7, m, n)


def _plateau(m: int, n: int, r: int) -> Tensor:
    # A cluster wider than any block, whose members differ by percents: most of it stays hidden
    # from a Krylov space of a few steps.
    d = min(m, n)
    sigma = torch.full((d,), 0.3, dtype=torch.float64)
    sigma[: 4 * r + 30] = 1.0
    spread = torch.linspace(0.05, 0, d, dtype=torch.float64)
    return with_spectrum(sigma + spread, m, n)


SPECTRA: dict[str, Callable[[int, int, int], Tensor]] = {
    "fast decay": lambda m, n, r: with_spectrum(0.8 ** _steps(min(m, n)), m, n),
    "slow decay": lambda m, n, r: with_spectrum(_steps(min(m, n)) ** -0.5, m, n),
    "harmonic": lambda m, n, r: with_spectrum(1 / _steps(min(m, n)), m, n),
    "flat bulk": lambda m, n, r: bulk(m, n),
    "spikes over a bulk": _spikes,
    "heavy tail over a bulk": _heavy,
    "one outlier": _outlier,
    "repeated at the cut": _repeated,
    "plateau": _plateau,
    "all equal": lambda m, n, r: with_spectrum(torch.ones(min(m, n)), m, n),
    "rank deficient": lambda m, n, r: with_spectrum(1 / _steps(max(1, r // 2)), m, n),
    "rank one": lambda m, n, r: with_spectrum(torch.ones(1), m, n),
    "rank exactly r": lambda m, n, r: with_spectrum(_steps(r) ** -0.5, m, n),
    "clusters": lambda m, n, r: with_spectrum(2.0 ** -(_steps(min(m, n)) // r), m, n),
    "graded by decades": lambda m, n, r: with_spectrum(
        torch.logspace(0, -12, min(m, n), dtype=torch.float64), m, n
    ),
}


def best_energy(W: Tensor, rank: int) -> float:
    """Return the sum of the `rank` largest sigma^2 of W, in float64."""
    return float(torch.linalg.svdvals(W.double())[:rank].square().sum())


def missed_energy(
    W: Tensor, U: Tensor, S: Tensor, Vt: Tensor, *, best: float | None = None
) -> float:
    """Return the share of the best energy that W - U S Vt fails to remove, in float64.

    Unlike 1 - sum S^2 / best it also sees factors that are off.
    """
    exact = W.double()
    best = best_energy(W, len(S)) if best is None else best
    rest = exact - (U.double() * S.double()) @ Vt.double()
    removed = float(exact.square().sum() - rest.square().sum())
    return (best - removed) / best if best > 0 else 0.0
