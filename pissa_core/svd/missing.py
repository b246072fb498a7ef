"""How much energy the best r triplets could hold beyond what was found."""

from __future__ import annotations

import torch
from torch import Tensor

RESOLUTION = 4e-6  # share of the energy below which float32 sums of squares say nothing
_SAFETY = 3.0
_SAFETY_WHERE_HIDDEN = 10.0
_DROP = 0.25  # of a cluster's width: a drop this large ends it
_TINY = torch.finfo(torch.float64).tiny
_BISECTIONS = 16
_ROUNDING = 8 * torch.finfo(torch.float32).eps  # of G v, relative to the largest eigenvalue


def could_be_missing(
    values: Tensor, couplings: Tensor, rank: int, block: int, *, early: bool = False
) -> float:
    """Estimate from above the share of the optimal energy that r Ritz pairs miss.

    In the basis of the Ritz vectors G is [[Theta, L^T], [L, H]], where only H, what G does outside
    the basis, is not known. If G has no eigenvalue above delta outside the h leading Ritz vectors,
    that is, if [[Theta_rest, L_rest^T], [L_rest, H]] <= delta, then

        H <= delta - L_rest (delta - Theta_rest)^-1 L_rest^T,

    and the eigenvalues of G above theta_r are at most those of [[Theta_h, L_h^T], [L_h, H_r]],
    where the other Ritz vectors are eliminated at theta_r:

        H_r = delta - L_rest ((delta - Theta_rest)^-1 - (theta_r - Theta_rest)^-1) L_rest^T.

    Where theta_r <= delta, H_r is delta alone.

    Shapes   values (k,) descending; couplings (b, k), the columns G v_i - theta_i v_i in an
             orthonormal basis of the space they lie in; rank < block <= k.
    Error    **an estimate, not a bound**: given delta it is a bound, but delta is not known.
             *Hypothesis*: delta is at least the largest eigenvalue outside the h leading Ritz
             vectors, or lacks of it no more than the factor below makes up for. A Gaussian start
             of 16 vectors or more all but lacks no single direction (its squared share is below
             a hundredth of the mean with probability < 1e-10, chi-square), but it can all but
             lack one of a cluster with as many members as it has vectors, or more.
             *Where delta is taken*: at theta_h + |G v_h - theta_h v_h|, h = 2 block. h = block in
             the first steps (`early`), where fewer than three blocks are known, and where
             `may_hide_members`; then the caller takes the larger of two steps' estimates, too.
             What could be gained counts threefold, tenfold where members may hide. Residuals
             within float32 rounding of theta_1 count as none; RESOLUTION covers them.
             *Found*: a fuzz of 2000 spectra, most of them of clusters one to three blocks wide,
             met none below the truth. A climb from spectra to worse ones (9000 runs, ranks 1 to
             16, all steps from the third) came no nearer than truth = 0.7 of what is said. Before
             drops counted from theta_{block-1} on, and tenfold, it met clusters as wide as the
             block, of which the estimate was up to 4 times below the truth (13 of 5800 runs at
             ranks 1 and 2, none at 4 to 16); with a block of 9, at rank 1, clusters two blocks
             wide in 1 of 100 starts. With a heavy tail it is 3 to 6 times above the truth.
    Source   the bordered form: Golub, Meurant 2010, "Matrices, Moments and Quadrature with
             Applications", ch. 6 (Gauss-Radau); Parlett 1998, "The Symmetric Eigenvalue Problem",
             sec. 10.1 and 11.7; the start: Kuczynski, Wozniakowski 1992, doi:10.1137/0613066.
    """
    total = float(values[:rank].clamp(min=0).sum())
    if total == 0.0:
        return 0.0
    hidden = may_hide_members(values, rank, block)
    levels = 1 if early or len(values) < 3 * block or hidden else 2
    head = levels * block - 1
    lengths = torch.linalg.vector_norm(couplings, dim=0)
    delta = float(values[head] + lengths[head])
    noise = _ROUNDING * values[0]
    heard = (lengths.square() - noise * noise).clamp(min=0).sqrt()
    L = couplings * (heard / lengths.clamp(min=_TINY))
    safety = _SAFETY_WHERE_HIDDEN if hidden else _SAFETY
    share = max(0.0, safety * _gain(values, L, rank, head, delta) / total)
    return share / (1 + share)


def reach(values: Tensor, couplings: Tensor, rank: int, head: int, ceiling: float) -> Tensor:
    """Bound each of the r largest eigenvalues of G, given the largest of G outside the basis.

    As in `could_be_missing`, but delta is no hypothesis: from H <= ceiling it follows that G is
    at most delta outside the h leading Ritz vectors as soon as

        L_rest (delta - Theta_rest)^-1 L_rest^T <= delta - ceiling      (Schur complement),

    whatever h is; the smallest such delta is found by bisection.

    Shapes   values (k,) descending, rank <= head < k; couplings (b, k) as in `could_be_missing`;
             returned (r,) float64, descending.
    Error    **a bound, given the ceiling**, of any symmetric G, of which values and couplings hold
             exactly.
    Cost     a problem of head + b, and a dozen of b.
    Source   as `could_be_missing`; Schur complement: Horn, Johnson 2013, "Matrix Analysis", 7.7.
    """
    delta = _above_the_rest(values[head:], couplings[:, head:], ceiling)
    return _reached(values, couplings, rank, head, delta)


def _above_the_rest(rest: Tensor, couplings: Tensor, ceiling: float) -> float:
    low = max(float(rest[0]), ceiling)
    high = low + float(torch.linalg.matrix_norm(couplings, 2))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        reduced = (couplings / (middle - rest).clamp(min=_ROUNDING * low)) @ couplings.t()
        if float(torch.linalg.eigvalsh(reduced)[-1]) <= middle - ceiling:
            high = middle
        else:
            low = middle
    return high


def _gain(values: Tensor, L: Tensor, rank: int, head: int, delta: float) -> float:
    """Return by how much the sum of r eigenvalues could exceed that of the Ritz values."""
    reached = _reached(values, L, rank, head, delta)
    return float(reached.clamp(min=0).sum() - values[:rank].clamp(min=0).sum())


def _reached(values: Tensor, L: Tensor, rank: int, head: int, delta: float) -> Tensor:
    """Return what the r largest eigenvalues could be, where no other is above delta."""
    bordered = torch.diag(torch.cat([values[:head], values.new_full((len(L),), delta)]))
    bordered[head:, :head] = L[:, :head]
    if values[rank - 1] > delta:
        rest, noise = values[head:], _ROUNDING * values[0]
        weights = 1 / (delta - rest).clamp(min=noise) - 1 / (values[rank - 1] - rest)
        bordered[head:, head:] -= (L[:, head:] * weights) @ L[:, head:].t()
    reached = torch.linalg.eigvalsh(bordered)  # asks the lower triangle alone
    # Outside these there may be delta as often as one likes.
    return torch.cat([reached, values.new_full((rank,), delta)]).topk(rank).values


def may_hide_members(values: Tensor, rank: int, block: int) -> bool:
    """Whether theta_r lies in a cluster of which a Krylov space may not have shown all members.

    It shows of a cluster no more members than the block is wide, until the polynomials resolve
    what tells them apart, and one less where the start all but lacks one. Then theta_r to theta_s,
    s >= block - 1, lie closer together than four times the drop to theta_{s+1}, and the residuals,
    which measure the couplings among the cluster, are much smaller than the distances of its
    values: `could_be_missing` takes it for settled. A step later the next member appears and the
    residuals grow. So where this is true, an estimate counts only together with that of the step
    before.
    """
    cluster = values[block - 2 :]
    drops = cluster[:-1] - cluster[1:]
    widths = values[rank - 1] - cluster[:-1]
    return bool((drops > torch.maximum(_DROP * widths, _ROUNDING * values[0])).any())
