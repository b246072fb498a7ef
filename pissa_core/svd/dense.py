"""The two methods PEFT has: the full SVD, and the randomised one with power iterations."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def exact(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Truncate a full SVD of W, taken in PEFT's orientation."""
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank], S[:rank], Vt[:rank]


def lowrank(
    W: Tensor, rank: int, niter: int, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `torch.svd_lowrank` does, with a generator of our own."""
    m, n = W.shape
    A = W.mT if m < n else W
    Omega = torch.randn(A.shape[1], rank, dtype=A.dtype, generator=generator).to(A.device)
    Q = torch.linalg.qr(A @ Omega).Q
    for _ in range(niter):
        Q = torch.linalg.qr(A.mT @ Q).Q
        Q = torch.linalg.qr(A @ Q).Q
    U, S, Vt = torch.linalg.svd(Q.mT @ A, full_matrices=False)
    U, V = Q @ U, Vt.mT
    if m < n:
        U, V = V, U
    return U, S, V.mT
