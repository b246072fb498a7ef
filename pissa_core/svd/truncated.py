"""One door to the truncated SVD: the method by name, the result with what certifies it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pissa_core.svd.dense import exact, lowrank
from pissa_core.svd.krylov import krylov


@dataclass(frozen=True, slots=True)
class TruncatedSvd:
    """The r leading singular triplets of W, W ~ U diag(S) Vt, and what was learned on the way.

    Attributes:
        U: (m, r) float32, orthonormal columns.
        S: (r,) float32, descending, not negative.
        Vt: (r, n) float32, orthonormal rows.
        method: the route taken.
        missed: upper estimate of the share of the optimal energy that S misses.
    """

    U: Tensor
    S: Tensor
    Vt: Tensor
    method: str
    missed: float


def truncated_svd(
    W: Tensor, rank: int, *, method: str, tolerance: float, niter: int, seed: int
) -> TruncatedSvd:
    """Find the `rank` leading singular triplets of W (m, n) float32."""
    generator = torch.Generator().manual_seed(seed)
    if method == "exact":
        return TruncatedSvd(*exact(W, rank), "exact", 0.0)
    if method == "lowrank":
        return TruncatedSvd(*lowrank(W, rank, niter, generator), "lowrank", 1.0)
    if rank * 4 >= min(W.shape) or min(W.shape) <= 64:
        return TruncatedSvd(*exact(W, rank), "exact", 0.0)
    U, S, Vt, missed = krylov(W, rank, tolerance, generator)
    return TruncatedSvd(U, S, Vt, "krylov", missed)
