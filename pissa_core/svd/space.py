"""A Krylov space that only grows, and a look at what lies outside it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from pissa_core.svd.krylov import random_start, solve_small, whole
from pissa_core.svd.orth import split_off

FRESH = 16


class Space:
    """The Krylov space of G, given as X -> X G: rows K, T = K G K^T, and where G leads out of it.

    Attributes:
        k: how many rows of K count; those after them are zero.
        capacity: how many may count.
        newest: (b, d), the orthonormal rest of the last product.
        B: (b, b) float64, that rest in coordinates of `newest`.
    """

    def __init__(
        self,
        apply: Callable[[Tensor], Tensor],
        start: Tensor,
        capacity: int,
        generator: Generator,
        *,
        look: int = 0,
    ) -> None:
        """Begin with the rows of `start` (b, d), with room for `capacity`.

        `look`: steps that `ceiling` takes, at least two; none if it is not asked.
        """
        (b, d), device = start.shape, start.device
        self.capacity, self.k, self.newest = capacity, 0, start
        self.K = torch.zeros(whole(capacity + FRESH * look), d, device=device)
        self.T = torch.zeros(capacity, capacity, dtype=torch.float64, device=device)
        self.B = torch.zeros(b, b, dtype=torch.float64, device=device)
        self._apply, self._generator, self._look = apply, generator, look

    def expand_to(self, size: int) -> None:
        """Take steps until the basis holds `size` vectors."""
        b = len(self.newest)
        while self.k < size:
            near = max(0, self.k - b)
            self.K[self.k : self.k + b] = self.newest
            self.k = k = self.k + b
            C, self.newest, self.B = split_off(
                self.K[: whole(k)], self._apply(self.newest), self._generator, self.K[near:k]
            )
            self.T[k - b : k, near:k] = C
            self.T[near:k, k - b : k] = C.t()

    def ritz(self, rank: int, *, graded: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Return Ritz values, their vectors as columns in coordinates of K, and their couplings.

        `graded`: ask for float64, whatever `solve_small` would do.
        """
        T = self.T[: self.k, : self.k]
        values, S = solve_small(T, rank, graded=graded)
        return values, S, self.B.t() @ S[self.k - len(self.newest) :].double()

    def vectors(self, S: Tensor, count: int) -> Tensor:
        """Return the first Ritz vectors, (count, d), from their coordinates."""
        return torch.mm(S[:, :count].t().float(), self.K[: self.k])

    def ceiling(self) -> float:
        """Estimate the largest eigenvalue of G outside the space, by Lanczos from new vectors.

        Error    what the steps show, and once more what the last of them added. Without any gap
                 in n dimensions, b vectors and q steps fall short by a share e with probability
                 (1.65 sqrt(n) exp(-sqrt(e) (2 q - 1)))^b at most: 1e-9 for n = 2048, b = 16 and
                 q = 6, e = 0.26. Found: with six steps of G, on spectra of weights right to a
                 hundredth, of a cluster just above a dense bulk short by a twentieth at most,
                 which is as little of the energy; with four of a `Square`, taken back to G, never
                 short by more than 0.3 hundredths.
        Source   Kuczynski, Wozniakowski 1992, doi:10.1137/0613066, thm 4.2, for each vector: the
                 space of a block holds those of all of its vectors.
        """
        K, k, b = self.K, self.k, FRESH
        fresh = random_start(b, K.shape[1], self._generator, K.device)
        fresh = split_off(K[: whole(k)], fresh, self._generator)[1]
        size, block = b * self._look, len(self.newest)
        T = torch.zeros(size, size, dtype=torch.float64, device=K.device)
        for j in range(0, size, b):
            K[k + j : k + j + b] = fresh
            # What G makes of vectors outside has a part in the newest rows of the space alone.
            near = K[k - block : k + j + b]
            basis = K[: whole(k + j + b)]
            C, fresh, _ = split_off(basis, self._apply(fresh), self._generator, near)
            T[j : j + b, : j + b] = C[:, block:]
        K[k : k + size].zero_()
        # These ask the lower triangle alone.
        before, now = (float(torch.linalg.eigvalsh(T[:n, :n])[-1]) for n in (size - b, size))
        return now + max(0.0, now - before) if math.isfinite(now + before) else math.inf
