"""The two methods PEFT has: the full SVD, and the randomised one with power iterations."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def exact(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Truncate the full SVD W = U diag(S) Vt to `rank`.

    Shapes   W (m, n), m = out_features, as PEFT decomposes it; U (m, r), S (r,), Vt (r, n).
    Dtype    float32 in and out.
    Error    backward stable: that of the SVD of W + E, ||E||_2 a small multiple of eps ||W||_2.
    Sign     LAPACK's. With the same orientation, strides and number of threads it is PEFT's.
    Cost     O(m n min(m, n)) flops; U, Vt and LAPACK's workspace are as large as W and min^2.
    """
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank], S[:rank], Vt[:rank]


def lowrank(
    W: Tensor, rank: int, niter: int, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `torch.svd_lowrank(W, q=rank, niter=niter)` does, with a generator of our own.

    Shapes   W (m, n); U (m, r), S (r,), Vt (r, n).
    Dtype    float32.
    Error    no oversampling: the space is that of `rank` Gaussian vectors after `niter` rounds of
             subspace iteration. On spectra like those of real weights, percents of the energy
             near rank r are missed (see benchmarks/kernel.py); `certify` says how much.
    Random   rank * min(m, n) normals from `generator`. On the CPU, a generator seeded with s gives
             exactly what torch gives after `torch.manual_seed(s)`; it is not the global one, so
             threads do not disturb each other.
    Cost     4 m n r (niter + 1) flops and 2 niter + 1 Householder QRs.
    Source   Halko, Martinsson, Tropp 2011, arXiv:0909.4061, alg. 4.4 and 5.1; torch/_lowrank.py.
    """
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
