"""Block Krylov with a block far narrower than the rank, and a look at what it cannot see."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from pissa_core.svd.krylov import Ritz, random_start, solve_small, whole
from pissa_core.svd.missing import beyond_ceiling
from pissa_core.svd.orth import split_off

BLOCK = 32
FRESH = 16
FRESH_STEPS = 6
_LEAST = 20 * BLOCK
# Vectors, in multiples of the rank, after which a tolerance of 1e-4 is usually met: the bound
# falls steeply once what is outside the space is below theta_r, and a problem solved before that
# is wasted. Each decade of tolerance is worth half a rank.
_USUAL = 6.25
_DECADE = 0.5
# |G v - theta v| that float32 leaves of a Ritz vector, relative to the largest eigenvalue:
# measured where one of 1000 stood above ones.
_ROUNDED = 64 * torch.finfo(torch.float32).eps
_GAIN = 2.2  # by which a step cuts what is missing, where it is hard


def fits_narrow(d: int, rank: int) -> bool:
    """Whether a narrow block is worth it: the rank is not narrow itself, and the basis fits."""
    return rank > BLOCK + BLOCK // 4 and 12 * rank <= d


def narrow_capacity(d: int, rank: int) -> int:
    """Return how many vectors the basis may hold."""
    return min(max(8 * rank, _LEAST), d // 2) // BLOCK * BLOCK


def few_eigenpairs(
    apply: Callable[[Tensor], Tensor],
    d: int,
    rank: int,
    extra: int,
    *,
    tolerance: float,
    generator: Generator,
    device: torch.device,
) -> Ritz | None:
    """Find the `rank` leading eigenpairs of G by a Krylov space of few vectors, or give up.

    With as many products a narrow block makes polynomials of a higher degree: two thirds of the
    vectors do, no restart is needed, and the space follows a recurrence of three blocks. But of a
    cluster with more members than the block is wide such a space shows no more than that many,
    and nothing in it tells. So before an answer counts, fresh random vectors look at G outside
    the space (`_Space.ceiling`): what they meet bounds what is missing, members that hide included.

    Shapes   X -> X G for X (b, d), any b; the Ritz pairs returned are rank + extra.
    Dtype    as `leading_eigenpairs`.
    Error    `beyond_ceiling`, a bound given the ceiling, which is an estimate, and `by_rounding`
             are together <= tolerance. None where `narrow_capacity` vectors do not reach that:
             spectra flat at theta_r, clusters wider than the block, a few values far above all
             others.
    Random   the start, the fresh vectors, and directions for dependent ones: from `generator`.
    Cost     k vectors, about six times the rank: k products, 2 d k^2 flops of Gram-Schmidt, one
             or two problems of size k; the look takes a hundred vectors more.
    Source   Meyer, Musco, Musco 2024, arXiv:2305.02535 (narrow blocks need fewer products, up to
             the logarithm of gaps); the rest as `leading_eigenpairs`.
    """
    space = _Space(apply, random_start(BLOCK, d, generator, device), rank, generator)
    wished = round((_USUAL - _DECADE * math.log10(tolerance / 1e-4)) * rank)
    while True:
        space.expand_to(min(wished, space.capacity) if space.k == 0 else wished)
        values, S, couplings = space.ritz(rank)
        missed = space.missed(values, couplings, rank, tolerance)
        if missed <= tolerance:
            kept = rank + extra
            vectors = torch.mm(S[:, :kept].t().float(), space.K[: space.k])
            steps = space.k // BLOCK
            return Ritz(values, vectors, space.newest, couplings[:, :kept], missed, steps)
        if by_rounding(values, rank) > tolerance:
            return None
        more = max(1, math.ceil(math.log(missed / tolerance) / math.log(_GAIN)))
        wished = space.k + more * BLOCK
        if wished > space.capacity:
            return None


def by_rounding(values: Tensor, rank: int) -> float:
    """Estimate the share of the energy that float32 products cost, from their error e in G v.

    It costs e^2 / (theta_i - lambda) of a pair, and never more than theta_i; lambda is taken to be
    at most three quarters of theta_i, since roundings do not prefer the leading ones.
    """
    kept = values[:rank].clamp(min=0)
    if float(kept.sum()) == 0.0:
        return 0.0
    error = _ROUNDED * float(values[0])
    lost = torch.minimum(kept, 4 * error * error / kept.clamp(min=error))
    return float(lost.sum() / kept.sum())


class _Space:
    """A Krylov space that only grows: rows K, T = K G K^T, and where G leads out of it.

    Attributes:
        k: how many rows of K count; those after them are zero.
        newest: (b, d), the orthonormal rest of the last product.
        B: (b, b) float64, that rest in coordinates of `newest`.
    """

    def __init__(
        self, apply: Callable[[Tensor], Tensor], start: Tensor, rank: int, generator: Generator
    ) -> None:
        d, device = start.shape[1], start.device
        self.capacity = narrow_capacity(d, rank)
        rows = whole(self.capacity + FRESH * FRESH_STEPS)
        self.K = torch.zeros(rows, d, dtype=torch.float32, device=device)
        self.T = torch.zeros(self.capacity, self.capacity, dtype=torch.float64, device=device)
        self.k = 0
        self.newest = start
        self.B = torch.zeros(BLOCK, BLOCK, dtype=torch.float64, device=device)
        self._apply, self._generator = apply, generator

    def expand_to(self, size: int) -> None:
        """Take steps until the basis holds `size` vectors."""
        while self.k < size:
            b, near = BLOCK, max(0, self.k - BLOCK)
            self.K[self.k : self.k + b] = self.newest
            self.k = k = self.k + b
            C, self.newest, self.B = split_off(
                self.K[: whole(k)], self._apply(self.newest), self._generator, self.K[near:k]
            )
            self.T[k - b : k, near:k] = C
            self.T[near:k, k - b : k] = C.t()

    def ritz(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return Ritz values, their vectors as columns in coordinates of K, and their couplings."""
        values, S = solve_small(self.T[: self.k, : self.k], rank)
        return values, S, self.B.t() @ S[self.k - BLOCK :].double()

    def missed(self, values: Tensor, couplings: Tensor, rank: int, tolerance: float) -> float:
        """Bound what is missing; look outside only where that could show that it is little."""
        head = rank + BLOCK - 1
        rounded = by_rounding(values, rank)
        likely = float(values[2 * rank] + torch.linalg.vector_norm(couplings[:, 2 * rank]))
        hoped = rounded + beyond_ceiling(values, couplings, rank, head, likely)
        if hoped > tolerance:
            return hoped
        told = rounded + beyond_ceiling(values, couplings, rank, head, self.ceiling())
        return max(hoped, told)

    def ceiling(self) -> float:
        """Estimate the largest eigenvalue of G outside the space, by Lanczos from new vectors.

        Error    what six steps show, and once more what the sixth of them added. Without any gap
                 in n dimensions, b vectors and q steps fall short by a share e with probability
                 (1.65 sqrt(n) exp(-sqrt(e) (2 q - 1)))^b at most: 1e-9 for n = 2048, e = 0.26.
                 On spectra of weights it is right to a hundredth; a cluster just above a dense
                 bulk is underestimated by up to a twentieth, which is as little of the energy.
        Source   Kuczynski, Wozniakowski 1992, doi:10.1137/0613066, thm 4.2, for each vector: the
                 space of a block holds those of all of its vectors.
        """
        K, k, b = self.K, self.k, FRESH
        fresh = random_start(b, K.shape[1], self._generator, K.device)
        fresh = split_off(K[: whole(k)], fresh, self._generator)[1]
        size = b * FRESH_STEPS
        T = torch.zeros(size, size, dtype=torch.float64, device=K.device)
        for j in range(0, size, b):
            K[k + j : k + j + b] = fresh
            # What G makes of vectors outside has a part in the newest rows of the space alone.
            near = K[k - BLOCK : k + j + b]
            basis = K[: whole(k + j + b)]
            C, fresh, _ = split_off(basis, self._apply(fresh), self._generator, near)
            T[j : j + b, : j + b] = C[:, BLOCK:]
        K[k : k + size].zero_()
        # These ask the lower triangle alone.
        before, now = (float(torch.linalg.eigvalsh(T[:n, :n])[-1]) for n in (size - b, size))
        return now + max(0.0, now - before)
