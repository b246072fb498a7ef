"""PiSSA itself: split W into a principal adapter and the residual that completes it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pissa_core.certify import Certificate, certify
from pissa_core.errors import NonFiniteWeight, RankTooLarge, UnsupportedDtype
from pissa_core.footprint import working_bytes as working_bytes
from pissa_core.spec import SvdConfig
from pissa_core.svd import TruncatedSvd, truncated_svd
from pissa_core.svd.operator import (
    GPU_PANEL_BYTES,
    PANEL_BYTES,
    SAFE_NORMS,
    panel_width,
    scale_,
)
from pissa_core.svd.products import times_transposed

_FEW = 48  # columns of a factor up to which a pass over memory costs more than a slower kernel


@dataclass(frozen=True, slots=True)
class Split:
    """W = R + scaling * B @ A.

    Attributes:
        B: (m, r) in the adapter's dtype.
        A: (r, n) in the adapter's dtype.
        R: (m, n) in W's dtype, laid out in memory as W is.
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
    found: TruncatedSvd | None = None,
    overwrite: bool = False,
) -> Split:
    """Split W into a principal adapter and the residual that completes it.

    W = R + scaling * B @ A, where scaling * B @ A is a rank-r approximation of W.

    Shapes   W, R (m, n); B (m, r); A (r, n); m = out_features, n = in_features: W as PEFT
             multiplies it. For a Conv1D, stored (in, out), pass the transposed *view* of what is
             stored: it is what PEFT decomposes; the strides of W do not change a bit of the
             result, and R comes back laid out like W, ready to be transposed and stored. With
             `overwrite`, W's own memory may hold R afterwards, and W is of no further use.
    Dtype    float16, bfloat16, float32 in; arithmetic in float32, which holds all of them exactly.
             ``faithful``: A and B are rounded to `adapter_dtype` first, then R is formed from the
             rounded factors and rounded once, to W's dtype.
             ``peft``: R is formed from the unrounded factors as (scaling * B) @ A, then A, B and R
             are each rounded to W's dtype, A and B widened to float32 again; `adapter_dtype` is
             not asked. With ``exact`` and the same number of threads: PEFT's, bit for bit.
    Error    exact method, before rounding: ||W - scaling B A||_2 = sigma_{r+1}, and ||.||_F^2 =
             sum_{j>r} sigma_j^2 (Eckart-Young); no rank-r matrix does better. Other methods: see
             `truncated_svd`. ``faithful`` recombines to W within u |R| per entry plus float32
             accumulation (u = 2^-8 bfloat16, 2^-11 float16; float16 entries below 6e-5 are
             subnormal and err by up to 2^-25). What came out is measured, in `certificate`.
    Sign     ``faithful``: the largest |entry| of each column of B is positive; ties go to the
             lowest row. ``peft``: LAPACK's. Columns that share a sigma are not unique.
    Random   from `seed` alone, see `truncated_svd`; threads in flight do not disturb each other.
    Cost     the SVD, unless it was found before, plus 4 m n r flops (6 if W is float32) in one
             pass that forms R and measures. Memory: `working_bytes`, and s m n unless `overwrite`.
    Raises   RankTooLarge if r > min(m, n); NonFiniteWeight, naming the first bad index;
             UnsupportedDtype if a factor or R does not fit the range of its dtype.
    Source   Meng, Wang, Zhang 2024, arXiv:2404.02948 (their A, B are our B, A).
    """
    _check_shape(W, rank)
    try:
        if found is None:
            found = truncated_svd(
                W, rank, method=svd.method, tolerance=svd.tolerance, niter=svd.niter, seed=seed
            )
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError):
        _refuse_non_finite(W)
        raise
    if rounding == "peft":
        return _as_peft(W, found, scaling)
    return _faithful(W, W if overwrite else torch.empty_like(W), found, scaling, adapter_dtype)


def _check_shape(W: Tensor, rank: int) -> None:
    m, n = W.shape
    if not 1 <= rank <= min(m, n):
        raise RankTooLarge(
            f"rank {rank} does not fit a {m} x {n} matrix, which has {min(m, n)} singular values",
            hint="lower the rank, or give this matrix its own with rank_pattern",
        )


def _refuse_non_finite(W: Tensor) -> None:
    bad = torch.nonzero(~torch.isfinite(W))
    if len(bad):
        row, column = bad[0].tolist()
        raise NonFiniteWeight(
            f"{len(bad)} of {W.numel()} entries are not finite, the first is "
            f"{float(W[row, column])} at [{row}, {column}]",
            hint="the checkpoint is damaged, or the training that made it diverged",
        )


def _faithful(
    W: Tensor, R: Tensor, found: TruncatedSvd, scaling: float, dtype: torch.dtype
) -> Split:
    root = torch.sqrt(found.S / scaling)
    signed = root * _signs(found.U)
    B = (found.U * signed).to(dtype).contiguous()
    A = (found.Vt * signed[:, None]).to(dtype).contiguous()
    residuals, discrepancy = _complete(W, R, found, B.float(), A.float(), scaling)
    _refuse_overflow(discrepancy, dtype, W.dtype)
    return Split(B, A, R, certify(found, residuals, discrepancy))


def _refuse_overflow(discrepancy: float, factors: torch.dtype, residual: torch.dtype) -> None:
    if not math.isfinite(discrepancy):
        raise UnsupportedDtype(
            f"the factors leave the range of {factors}, or the residual that of {residual}",
            hint="use adapter_dtype float32, which holds the factors of any matrix",
        )


def _signs(U: Tensor) -> Tensor:
    # argmax returns the first of equal entries on the CPU; elsewhere that is not promised, so
    # the lowest row is asked for.
    size = U.abs()
    rows = torch.arange(len(U), device=U.device)[:, None]
    first = torch.where(size == size.amax(dim=0), rows, len(U)).amin(dim=0, keepdim=True)
    signs: Tensor = torch.where(U.gather(0, first)[0] < 0, -1.0, 1.0)
    return signs


def _complete(
    W: Tensor, R: Tensor, found: TruncatedSvd, B: Tensor, A: Tensor, scaling: float
) -> tuple[Tensor, float]:
    """Form R = W - scaling B A, and measure, in one pass over W, in which R may lie.

    Returns:
        Residual norms (r,) of the triplets on the side that does not hold by construction;
        ||W - (R + scaling B A)||_F with R as stored.
    """
    by_rows = W.stride(1) == 1
    if by_rows:
        M, out, left, right = W, R, B, A.t().contiguous()
        triplets = found.U, found.S, found.Vt
    else:
        M, out, left, right = W.t(), R.t(), A.t().contiguous(), B
        triplets = found.Vt.t(), found.S, found.U.t()
    measured = _Residuals(*triplets, outer=(found.exact_side == "left") == by_rows)
    total = torch.zeros((), dtype=torch.float64, device=W.device)
    exponent = _exponent_for(found.norm)
    for i, j, P in row_panels(M):
        if found.residuals is None:
            measured.add(i, j, P)
        if W.dtype == torch.float32:
            product = times_transposed(left[i:j], right)
            torch.sub(P, product, alpha=scaling, out=out[i:j])
            P.sub_(out[i:j]).sub_(product, alpha=scaling)
        else:
            _subtract_product(P, left[i:j], right, scaling)
            out[i:j] = P
            P.sub_(out[i:j])
        rows = torch.linalg.vector_norm(scale_(P, exponent), dim=1).double()
        total += torch.dot(rows, rows)
    residuals = measured.norms() if found.residuals is None else found.residuals
    return residuals, math.ldexp(math.sqrt(float(total)), -exponent)


def _subtract_product(P: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    # In place saves memory and a pass over it: 15 ms of 29 for 5632 x 2048 and 16 columns.
    if left.shape[1] <= _FEW:
        P.addmm_(left, right.t(), alpha=-scaling)
    else:
        P.sub_(times_transposed(left, right), alpha=scaling)


def _exponent_for(norm: float) -> int:
    """Return the power of two by which a matrix of this norm is scaled before squaring."""
    return 0 if SAFE_NORMS[0] < norm < SAFE_NORMS[1] else -math.frexp(norm)[1]


class _Residuals:
    """Norms of M v - sigma u (outer) or M^T u - sigma v, gathered from row panels of M."""

    def __init__(self, U: Tensor, S: Tensor, Vt: Tensor, *, outer: bool) -> None:
        self._U, self._S, self._Vt, self._outer = U.contiguous(), S, Vt.contiguous(), outer
        self._sum = torch.zeros_like(Vt) if not outer else torch.zeros_like(S, dtype=torch.float64)

    def add(self, start: int, stop: int, P: Tensor) -> None:
        """Take account of the rows P = M[start:stop]."""
        u = self._U[start:stop]
        if self._outer:
            rest = times_transposed(P, self._Vt) - u * self._S
            self._sum += rest.double().square().sum(dim=0)
        else:
            self._sum += times_transposed(u.t().contiguous(), P.t())

    def norms(self) -> Tensor:
        """Return the r norms."""
        if self._outer:
            norms = self._sum.sqrt()
        else:
            rest = self._sum - self._S[:, None] * self._Vt
            norms = torch.linalg.vector_norm(rest.double(), dim=1)
        return norms


def row_panels(M: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop, P): the rows of M as float32, in memory of their own."""
    rows, width = M.shape
    nbytes = PANEL_BYTES if M.device.type == "cpu" else GPU_PANEL_BYTES
    step = panel_width(rows, nbytes // (4 * width))
    buffer = torch.empty(min(step, rows), width, dtype=torch.float32, device=M.device)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        yield start, stop, buffer[: stop - start].copy_(M[start:stop])


def _as_peft(W: Tensor, found: TruncatedSvd, scaling: float) -> Split:
    # Letter by letter `LoraLayer.pissa_init` of PEFT, whose V is our U.
    dtype = W.dtype
    weight = W.float()
    root = torch.diag(torch.sqrt(found.S / scaling))
    A = root @ found.Vt
    B = found.U @ root
    R = (weight - scaling * B @ A).to(dtype)
    B, A = B.to(dtype).float(), A.to(dtype).float()
    exponent = _exponent_for(found.norm)
    rest = scale_(torch.sub(weight, R).sub_(torch.mm(B, A), alpha=scaling), exponent)
    rows = torch.linalg.vector_norm(rest, dim=1).double()
    discrepancy = math.ldexp(float(torch.linalg.vector_norm(rows)), -exponent)
    _refuse_overflow(discrepancy, dtype, dtype)
    residuals = _Residuals(found.U, found.S, found.Vt, outer=found.exact_side == "left")
    residuals.add(0, len(weight), weight)
    return Split(B, A, R, certify(found, residuals.norms(), discrepancy))
