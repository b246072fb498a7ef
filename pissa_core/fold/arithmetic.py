"""The way back of one matrix, W = R + scaling · B · A, and how close to another it comes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pissa_core.errors import NonFiniteWeight, UnsupportedAdapter, UnsupportedDtype
from pissa_core.split import row_panels
from pissa_core.svd.operator import GPU_PANEL_BYTES, PANEL_BYTES
from pissa_core.svd.products import times_transposed

_SLACK = 16 << 20  # buffers of BLAS, what the allocator holds back


@dataclass(frozen=True, slots=True)
class Likeness:
    """How two matrices of one dtype compare, entry by entry.

    Attributes:
        equal: entries with the same bits.
        max_ulps: the largest distance, counted in representable numbers; 0 and -0 are none apart.
        distance: ||W - V||_F / ||V||_F.
    """

    equal: int
    max_ulps: int
    distance: float


def fold_in(R: Tensor, B: Tensor, A: Tensor, *, scaling: float) -> float:
    """Add scaling · B · A to R in place, and return ||scaling · B · A||_F / ||R||_F.

    Shapes   R (m, n); B (m, r); A (r, n); m = out_features, n = in_features. For a Conv1D or an
             embedding, stored (in, out), pass the transposed *view* of what is stored.
    Dtype    R float16, bfloat16 or float32; A and B any of them. The sum is formed in float32,
             in the panels and by the products that `split_principal` forms a residual with, and
             rounded once to R's dtype.
    Error    with the factors R was made with (``faithful``): the original to u |R| + u |W| an
             entry, and float32 accumulation; often to the bit, where |R| is small against |W|.
    Cost     2 m n r flops in one pass over R. Memory: `folding_bytes`.
    Raises   UnsupportedDtype if the sum leaves the range of R's dtype; NonFiniteWeight,
             UnsupportedAdapter if what came in is not finite already.
    """
    M, left, right = R, B.float(), A.float().t().contiguous()
    if R.stride(1) != 1:
        M, left, right = R.t(), right, left
    added = torch.zeros((), dtype=torch.float64, device=R.device)
    before = torch.zeros_like(added)
    for i, j, P in row_panels(M):
        product = times_transposed(left[i:j], right)
        before += torch.linalg.vector_norm(P, dim=1, dtype=torch.float64).square().sum()
        added += torch.linalg.vector_norm(product, dim=1, dtype=torch.float64).square().sum()
        total = P.add_(product, alpha=scaling).to(R.dtype)
        if not bool(torch.isfinite(total).all()):
            raise _not_finite(M[i:j], left, right, R.dtype)
        M[i:j] = total
    norm = math.sqrt(float(before))
    return abs(scaling) * math.sqrt(float(added)) / norm if norm > 0 else 0.0


def _not_finite(rows: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> Exception:
    if not (bool(torch.isfinite(left).all()) and bool(torch.isfinite(right).all())):
        return UnsupportedAdapter(
            "the adapter's factors are not finite", hint="the training that made it diverged"
        )
    if not bool(torch.isfinite(rows).all()):
        return NonFiniteWeight(
            "the residual is not finite", hint="the checkpoint is damaged; run `pissa verify`"
        )
    return UnsupportedDtype(
        f"the merged weights leave the range of {dtype}",
        hint="use the adapter unmerged, or a residual made from the float32 or bfloat16 model",
    )


def compare(W: Tensor, V: Tensor) -> Likeness:
    """Hold W against V, both (p, q), contiguous and of one dtype, in panels of rows."""
    equal, ulps, apart, norm = 0, 0, 0.0, 0.0
    for i, j, P in row_panels(V):
        mine, theirs = _ordered(W[i:j]), _ordered(V[i:j])
        equal += int((_bits(W[i:j]) == _bits(V[i:j])).sum())
        ulps = max(ulps, int((mine - theirs).abs_().max()))
        norm += float(torch.linalg.vector_norm(P, dim=1, dtype=torch.float64).square().sum())
        rest = torch.sub(W[i:j].float(), P)
        apart += float(torch.linalg.vector_norm(rest, dim=1, dtype=torch.float64).square().sum())
    return Likeness(equal, ulps, math.sqrt(apart / norm) if norm > 0 else math.sqrt(apart))


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def _ordered(x: Tensor) -> Tensor:
    """Number the floats: neighbours are one apart, and both zeros are 0."""
    bits = _bits(x)
    smallest = torch.iinfo(bits.dtype).min
    wide = bits.to(torch.int64)
    return torch.where(wide < 0, smallest - wide, wide)


def folding_bytes(
    m: int, n: int, rank: int, dtype_bytes: int, *, compared: bool, device: str = "cpu"
) -> int:
    """Return an upper bound of the bytes that folding one matrix keeps alive at once.

    R as stored, the original as well where the two are compared, the factors as stored, in
    float32 and turned, and a few panels. On a GPU panels are larger, up to R in float32, and
    nothing is compared; the host needs R as stored thrice.
    """
    matrices = (2 if compared and device == "cpu" else 1) * dtype_bytes * m * n
    panels = 16 * max(PANEL_BYTES, 64 * max(m, n))
    if device == "cuda":
        panels += 5 * min(GPU_PANEL_BYTES, 4 * m * n)
    return matrices + 12 * (m + n) * rank + panels + _SLACK
