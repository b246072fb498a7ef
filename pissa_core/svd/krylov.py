"""Thick-restarted block Krylov for the leading eigenpairs of a symmetric operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from pissa_core.svd.missing import could_be_missing, may_hide_members
from pissa_core.svd.orth import NARROW, orthonormal_rows, split_off

_CHEAP_UP_TO = 200  # a problem of this size costs less than a step
LEAST_STEPS = 3  # before that, what is missing cannot be judged
EARLY_STEPS = 4  # up to that, a second block of Ritz values tells little
_SIZES = 128
_DOUBLE_UP_TO = 256  # a small problem of this size is solved in float64 at no cost to speak of
GRADED = 1e-4  # theta_r / theta_1 below this: the small problem needs float64 whatever its size


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Krylov run.

    Attributes:
        block: vectors that start, and are added by a step; at least the rank.
        keep: Ritz vectors that survive a restart; at least the rank.
        capacity: vectors the basis may hold before it is restarted.
        max_steps: products with the operator after which it gives up.
    """

    block: int
    keep: int
    capacity: int
    max_steps: int


@dataclass(frozen=True, slots=True)
class Ritz:
    """The leading Ritz pairs.

    Attributes:
        values: float64, descending, p of them or more.
        vectors: (p, d) float32, orthonormal rows, of the p leading ones, p > rank.
        residuals: (p, d) float32, G v - theta v of each vector.
        missed: what `could_be_missing`, or `few_eigenpairs`, says of the leading ones.
        steps: products with the operator that were taken.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    missed: float
    steps: int


def leading_eigenpairs(
    apply: Callable[[Tensor], Tensor],
    start: Tensor,
    rank: int,
    shape: Shape,
    *,
    tolerance: float,
    generator: Generator,
) -> Ritz:
    """Find the `rank` leading eigenpairs of G, given as X -> X G, to a share of their sum.

    The basis is [Q1, Q2, ...], each block the rest of Q_j G after projection on all before it, so
    T = K G K^T fills by the columns the projection computes anyway, and the residuals of all
    Ritz pairs follow from the last block alone. When the basis is full, the leading Ritz vectors
    and the newest block start a new one.

    Shapes   X, start (b, d), b = shape.block >= rank; G (d, d) symmetric, semidefinite.
    Dtype    float32; the small problem float64 up to 256, or where eigenvalues are graded.
    Error    stops when `could_be_missing` <= tolerance, which see; at the latest after
             max_steps. A block as wide as the rank finds repeated eigenvalues, and needs no gap:
             relative error O((log d / steps)^2) whatever the spectrum.
    Random   the start, and directions that replace a block that has become dependent.
    Cost     per step one product, 8 d k b flops of Gram-Schmidt (half of it mostly), and at most
             k^3-ish for the small problem, which is solved where that is cheap or unavoidable.
    Source   Musco, Musco 2015, arXiv:1504.05477, alg. 2 and thm 1; Wu, Simon 2000,
             doi:10.1137/S0895479898334605 (thick restart).
    """
    b, d = start.shape
    K = torch.zeros(whole(shape.capacity + b), d, dtype=torch.float32, device=start.device)
    T = torch.zeros(shape.capacity, shape.capacity, dtype=torch.float64, device=start.device)
    K[:b] = start
    k, step, solved_at, before = b, 0, 0, 0.0
    wide = LEAST_STEPS * b > _CHEAP_UP_TO and tolerance > 0
    solve_at = LEAST_STEPS + wide
    while True:
        step += 1
        basis = K[: k if b < NARROW else whole(k)]
        C, Q, B = split_off(basis, apply(K[k - b : k]), generator)
        T[k - b : k, :k] = C[:, :k]
        T[:k, k - b : k] = C[:, :k].t()
        full = k + b > shape.capacity
        judged = step >= solve_at or step >= shape.max_steps
        if judged or full:
            values, S = solve_small(T[:k, :k], rank)
        if judged:
            couplings = B.t() @ S[k - b :].double()
            missed = latest = could_be_missing(
                values, couplings, rank, b, early=step <= EARLY_STEPS
            )
            confirmed = True
            if may_hide_members(values, rank, b):
                confirmed = solved_at == step - 1
                missed = max(latest, before)
            enough = missed <= tolerance and confirmed and step >= LEAST_STEPS
            if enough or step >= shape.max_steps:
                vectors = torch.mm(S[:, :b].t().float(), K[:k])
                residuals = torch.mm(couplings[:, :b].t().float(), Q)
                return Ritz(values, vectors, residuals, missed, step)
            before, solved_at = latest, step
            solve_at = step + _steps_until(latest, tolerance, k)
        if full:
            K[: shape.keep] = torch.mm(S[:, : shape.keep].t().float(), K[:k])
            K[shape.keep :].zero_()
            T.zero_()
            T.diagonal()[: shape.keep] = values[: shape.keep]
            k = shape.keep
        K[k : k + b] = Q
        k += b


def random_start(block: int, d: int, generator: Generator, device: torch.device) -> Tensor:
    """Return `block` orthonormal rows of length d, uniform; drawn on the CPU for every device."""
    return orthonormal_rows(torch.randn(block, d, generator=generator).to(device), generator)[0]


def solve_small(T: Tensor, rank: int, *, graded: bool = False) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of T (float64, descending) and its eigenvectors as columns.

    In float64 where it is small or graded: that is, `graded` says so, or its diagonal shows it.
    """
    small = len(T) <= _DOUBLE_UP_TO
    diagonal = T.diagonal().sort(descending=True).values
    graded |= not small and float(diagonal[rank - 1]) < GRADED * float(diagonal[0])
    values, S = torch.linalg.eigh(T if small or graded else T.float())
    return values.flip(0).double(), S.flip(1)


def whole(k: int) -> int:
    """Return k rounded up to one of a few sizes, with which wide blocks' products are made.

    Further rows of the basis are zero. oneDNN compiles, and keeps, a kernel of nearly a megabyte
    for every size it meets.
    """
    return -(-k // _SIZES) * _SIZES


def _steps_until(missed: float, tolerance: float, k: int) -> int:
    # A step cuts what is missing by 3 where it is hard, by 30 where it is easy. A small problem
    # costs next to nothing; one of many hundreds as much as a step, and waits for the hard case.
    if k <= _CHEAP_UP_TO:
        return 1
    if tolerance == 0 or missed <= tolerance:
        return 1
    return max(1, round(math.log(missed / tolerance) / math.log(4)))
