"""W as the iterative routes see it: float32 products from the stored bytes, panel by panel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pissa_core.svd.products import BFLOAT16, times_transposed

PANEL_BYTES = 2 << 20  # a float32 panel that stays in a core's cache through both products
GPU_PANEL_BYTES = 256 << 20  # few launches, and still little of the device's memory
GRAM_PANEL = 1024
GRAM_BLOCK = 512
GPU_GRAM_PANEL = 2048
# While ||W||_F lies between these, sigma_1^8 neither overflows nor vanishes in float32, up to
# 2^15 singular values: squares of the rows that (W^T W)^2 makes.
SAFE_NORMS = (2.0**-8, 2.0**15)


@dataclass(frozen=True, slots=True)
class Operator:
    """The symmetric M^T M of the shorter side of W, and the way back to the longer side.

    M is W or its transpose, whichever is tall. W stays as stored; panels of M's rows are
    converted to float32, scaled by a power of two, and used for both products of a Gram step
    while they are in cache: W is read once a step, and no float32 copy of it is made.

    Shapes   M (D, d), D >= d; vectors are rows, X (b, d).

    Attributes:
        W: the matrix (m, n), float16, bfloat16 or float32, rows or columns contiguous.
        exponent: W is multiplied by 2^exponent as it is read.
    """

    W: Tensor
    exponent: int = 0

    @property
    def tall(self) -> bool:
        """Whether M is W itself rather than its transpose."""
        return self.W.shape[0] >= self.W.shape[1]

    @property
    def short(self) -> int:
        """The length d of the shorter side."""
        return min(self.W.shape)

    @property
    def long(self) -> int:
        """The length D of the longer side."""
        return max(self.W.shape)

    def apply(self, X: Tensor) -> Tensor:
        """Return X M^T M (b, d), reading W once."""
        Z = torch.zeros_like(X)
        for _, _, P in self._panels():
            Z += times_transposed(times_transposed(X, P), P.t())
        return Z

    @property
    def has_rough_products(self) -> bool:
        """Whether `apply_roughly` is there, and faster than `apply`."""
        plain = self.W.dtype == torch.bfloat16 and self.exponent == 0
        return BFLOAT16 and plain and self.W.device.type == "cpu"

    def apply_roughly(self, X: Tensor) -> Tensor:
        """Return X M^T M (b, d), rounded to bfloat16 thrice, in half the time of `apply`.

        Shapes   X (b, d) float32; where `has_rough_products`.
        Dtype    bfloat16 operands, sums in float32.
        Error    of W no bit is lost, as it is bfloat16; X, X M^T and each panel's share of the
                 result are rounded by 2^-9 of an entry.
        Cost     4 D d b flops at twice the speed of float32; W is read once.
        Source   rounding: Higham 2002, "Accuracy and Stability of Numerical Algorithms", ch. 2, 3.
        """
        Z = torch.zeros_like(X)
        narrow = X.bfloat16()
        for P in self._stored_panels(self._panel_width(None)):
            Z += times_transposed(times_transposed(narrow, P), P.t())
        return Z

    def _stored_panels(self, width: int) -> Iterator[Tensor]:
        """Yield rows of M as stored, (width, d), dense by rows or by columns."""
        for start in range(0, self.long, width):
            P = (self.W if self.tall else self.W.t())[start : start + width]
            if P.stride(1) != 1:
                # For columns out of a wider matrix oneDNN has nothing but a slow kernel.
                P = P.t().contiguous().t()
            elif P.data_ptr() % 64 or not P.is_contiguous():
                P = P.clone(memory_format=torch.contiguous_format)  # see _needs_no_copy
            yield P

    def drop(self, Y: Tensor) -> Tensor:
        """Return Y M (b, d), the images of Y (b, D) on the shorter side."""
        Z = torch.zeros(Y.shape[0], self.short, dtype=torch.float32, device=Y.device)
        for start, stop, P in self._panels():
            Z += times_transposed(Y[:, start:stop].contiguous(), P.t())
        return Z

    def lift(self, X: Tensor) -> Tensor:
        """Return X M^T (b, D), the vectors' images on the longer side."""
        Y = torch.empty(X.shape[0], self.long, dtype=torch.float32, device=X.device)
        for start, stop, P in self._panels():
            Y[:, start:stop] = times_transposed(X, P)
        return Y

    def gram(self, *, roughly: bool = False) -> Tensor:
        """Return M^T M (d, d); the blocks of one triangle are computed, the others copied.

        `roughly`: in half the time, each panel's share rounded to bfloat16.
        """
        d = self.short
        G = torch.zeros(d, d, dtype=torch.float32, device=self.W.device)
        if self.W.device.type != "cpu":
            return self._gram_on_gpu(G)
        side = GRAM_BLOCK // (1 + roughly)  # smaller ones waste less, and bfloat16 is soon fast
        blocks = [(i, min(i + side, d)) for i in range(0, d, side)]
        width = self._panel_width(GRAM_PANEL)
        panels = (P for _, _, P in self._panels(width))
        for P in self._stored_panels(width) if roughly else panels:
            Pt = P.t().contiguous()
            for i, j in blocks:
                G[i:j, i:] += times_transposed(Pt[i:j], Pt[i:])
        for i, j in blocks:
            G[j:, i:j] = G[i:j, j:].t()
        return G

    def _gram_on_gpu(self, G: Tensor) -> Tensor:
        # float16 and bfloat16 are exact operands of the tensor cores, which add up in float32 and
        # cut where the CPU rounds: panels keep the bias of that below 1e-5 of the diagonal.
        if self.tensor_cores:
            M = self.W if self.tall else self.W.t()
            for start in range(0, self.long, GPU_GRAM_PANEL):
                P = M[start : start + GPU_GRAM_PANEL]
                G += torch.mm(P.t(), P, out_dtype=torch.float32)
            return G
        for _, _, P in self._panels():
            G.addmm_(P.t(), P)
        return G

    @property
    def tensor_cores(self) -> bool:
        """Whether a Gram matrix is formed from the bytes as stored, many times faster."""
        half = self.W.dtype in (torch.float16, torch.bfloat16)
        return half and self.exponent == 0 and self.W.device.type == "cuda"

    def norm(self) -> float:
        """Return the Frobenius norm of the scaled W; inf or nan where float32 squares overflow."""
        total = torch.zeros((), dtype=torch.float64, device=self.W.device)
        # Along memory: across it, conversion takes twice and the sum ten times as long.
        L = self.W if self.W.stride(1) == 1 else self.W.t()
        nbytes = PANEL_BYTES if L.device.type == "cpu" else GPU_PANEL_BYTES
        panels = torch.split(L, panel_width(len(L), nbytes // (4 * L.shape[1])))
        buffer = torch.empty(panels[0].shape, dtype=torch.float32, device=L.device)
        for lines in panels:
            P = scale_(buffer[: len(lines)].copy_(lines), self.exponent)
            lengths = torch.linalg.vector_norm(P, dim=1).double()
            total += torch.dot(lengths, lengths)
        return math.sqrt(float(total))

    def _panels(self, width: int | None = None) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (start, stop, P), P (stop - start, d) being rows of M as float32, scaled."""
        M = self.W if self.tall else self.W.t()
        step = self._panel_width(width)
        direct = self._needs_no_copy(M)
        buffer = None if direct else _buffer_like(M, step)
        for start in range(0, self.long, step):
            rows = M[start : start + step]
            if buffer is None:
                P = rows
            else:
                # The last panel is narrower: memory of its own keeps it contiguous.
                P = buffer if len(rows) == step else _buffer_like(M, len(rows))
                scale_(P.copy_(rows), self.exponent)
            yield start, start + len(rows), P

    def _needs_no_copy(self, M: Tensor) -> bool:
        # Rows must follow each other in memory for the kernels, and W begin where torch's own
        # tensors do: BLAS may take other code, with other last bits, for other alignments.
        plain = M.dtype == torch.float32 and self.exponent == 0
        return plain and M.is_contiguous() and M.data_ptr() % 64 == 0

    def _panel_width(self, width: int | None) -> int:
        if self.W.device.type != "cpu":
            return panel_width(self.long, GPU_PANEL_BYTES // (4 * self.short))
        return panel_width(self.long, width or PANEL_BYTES // (4 * self.short))


def panel_width(length: int, widest: int) -> int:
    """Choose a width of panels along `length`: about `widest`, and dividing it where one can.

    Panels of one width need kernels for one width.
    """
    widest = max(16, widest // 16 * 16)
    if length <= widest:
        return length
    for width in range(widest, widest // 2, -16):
        if length % width == 0:
            return width
    return widest


def _buffer_like(M: Tensor, rows: int) -> Tensor:
    # As M lies in memory, by rows or by columns, so that the conversion streams.
    d = M.shape[1]
    if M.stride(1) == 1:
        return torch.empty(rows, d, dtype=torch.float32, device=M.device)
    return torch.empty(d, rows, dtype=torch.float32, device=M.device).t()


def scale_(T: Tensor, exponent: int) -> Tensor:
    """Multiply T by 2^exponent in place; exact unless the result is subnormal or overflows."""
    while exponent:
        step = max(-100, min(100, exponent))  # 2^100 fits float32; larger exponents take turns
        T.mul_(math.ldexp(1.0, step))
        exponent -= step
    return T


def operator_of(W: Tensor) -> tuple[Operator, float]:
    """Wrap W, scaled by a power of two where its squares would leave float32, with its norm.

    Returns:
        The operator and the Frobenius norm of the *scaled* W: 0 for a zero matrix, nan if an
        entry is not finite.
    """
    if W.stride(0) != 1 and W.stride(1) != 1:
        W = W.contiguous()
    plain = Operator(W)
    norm = plain.norm()
    if SAFE_NORMS[0] < norm < SAFE_NORMS[1]:
        return plain, norm
    largest = float(torch.linalg.vector_norm(W, ord=math.inf)) if W.numel() else 0.0
    if largest == 0.0:
        return plain, 0.0
    if not math.isfinite(largest):
        return plain, math.nan
    scaled = Operator(W, -math.frexp(largest)[1])
    return scaled, scaled.norm()
