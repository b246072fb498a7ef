"""PiSSA itself: split W into a principal adapter and the residual that completes it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from pissa_core.certify import Certificate
from pissa_core.errors import NonFiniteWeight, RankTooLarge
from pissa_core.spec import SvdConfig
from pissa_core.svd import TruncatedSvd, truncated_svd


@dataclass(frozen=True, slots=True)
class Split:
    """W = R + scaling * B @ A.

    Attributes:
        B: (m, r) in the adapter's dtype.
        A: (r, n) in the adapter's dtype.
        R: (m, n) in W's dtype.
        certificate: what was measured.
    """

    B: Tensor
    A: Tensor
    R: Tensor
    certificate: Certificate


def matrix_seed(seed: int, tensor: str) -> int:
    """Derive a matrix's own seed from the job's and the tensor's name, whatever the order."""
    digest = hashlib.sha256(f"{seed}\0{tensor}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def split_principal(
    W: Tensor,
    rank: int,
    *,
    scaling: float,
    svd: SvdConfig,
    seed: int,
    rounding: str,
    adapter_dtype: torch.dtype,
) -> Split:
    """Split W (m, n) into B (m, r), A (r, n) and R (m, n) with W = R + scaling * B @ A."""
    if rank > min(W.shape):
        raise RankTooLarge(f"rank {rank} exceeds min(m, n) of a {tuple(W.shape)} matrix")
    exact_w = W.float()
    norm = float(torch.linalg.vector_norm(exact_w))
    if norm != norm or norm == float("inf"):
        bad = torch.nonzero(~torch.isfinite(exact_w))
        if len(bad):
            row, column = bad[0].tolist()
            raise NonFiniteWeight(f"entry [{row}, {column}] is {float(exact_w[row, column])}")
    found = truncated_svd(
        exact_w, rank, method=svd.method, tolerance=svd.tolerance, niter=svd.niter, seed=seed
    )
    if rounding == "peft":
        B, A, R = _as_peft(exact_w, found, scaling, W.dtype)
    else:
        B, A, R = _faithful(exact_w, found, scaling, W.dtype, adapter_dtype)
    error = torch.linalg.vector_norm(exact_w - R.float() - scaling * (B.float() @ A.float()))
    S = found.S.double()
    certificate = Certificate(
        sigma=tuple(found.S.tolist()),
        energy=float((S * S).sum()) / norm**2 if norm else 0.0,
        missed=found.missed,
        recombination_error=float(error) / norm if norm else 0.0,
        method=found.method,
    )
    return Split(B, A, R, certificate)


def _as_peft(
    W: Tensor, found: TruncatedSvd, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    root = torch.diag(torch.sqrt(found.S / scaling))
    A = root @ found.Vt
    B = found.U @ root
    R = (W - scaling * B @ A).to(dtype)
    return B.to(dtype).float(), A.to(dtype).float(), R


def _faithful(
    W: Tensor, found: TruncatedSvd, scaling: float, dtype: torch.dtype, adapter_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    peak = found.U.abs().argmax(dim=0, keepdim=True)
    sign = torch.where(found.U.gather(0, peak)[0] < 0, -1.0, 1.0)
    root = torch.sqrt(found.S / scaling) * sign
    B = (found.U * root).to(adapter_dtype)
    A = (found.Vt * root[:, None]).to(adapter_dtype)
    R = torch.addmm(W, B.float(), A.float(), alpha=-scaling).to(dtype)
    return B, A, R


def working_bytes(m: int, n: int, rank: int, dtype_bytes: int, method: str) -> int:
    """Upper bound of the bytes that splitting one matrix keeps alive at once."""
    basis = (m + n) * min(rank * 12, min(m, n))
    full = 2 * (m + n) * min(m, n) if method == "exact" else 0
    return m * n * (2 * dtype_bytes + 12) + 4 * (basis + full)
