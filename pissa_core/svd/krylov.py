"""Block Krylov for the leading singular triplets (Musco & Musco 2015, arXiv:1504.05477)."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def krylov(
    W: Tensor, rank: int, tolerance: float, generator: Generator
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Find the leading triplets of W to `tolerance` of their energy."""
    m, n = W.shape
    block = rank + 8
    Omega = torch.randn(n, block, generator=generator).to(W.device)
    Q = torch.linalg.qr(W @ Omega).Q
    K, P = Q, W.mT @ Q
    energy, missed, depth = 0.0, 1.0, 1
    while True:
        square, E = torch.linalg.eigh((P.mT @ P).double())
        found = float(square[-rank:].clamp(min=0).sum())
        gain = found - energy
        energy, missed = found, gain * depth / found if found > 0 else 0.0
        if missed <= tolerance or K.shape[1] + block > min(m, n):
            break
        Y = W @ P[:, -block:]
        for _ in range(2):
            Y = Y - K @ (K.mT @ Y)
        Q = torch.linalg.qr(Y).Q
        Q = torch.linalg.qr(Q - K @ (K.mT @ Q)).Q
        K, P, depth = torch.cat([K, Q], 1), torch.cat([P, W.mT @ Q], 1), depth + 1
    E = E[:, -rank:].flip(1).float()
    V, R = torch.linalg.qr(P @ E)
    u, S, vt = torch.linalg.svd(R.mT)
    return K @ (E @ u), S, vt @ V.mT, missed
