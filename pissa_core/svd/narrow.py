"""Block Krylov with a block far narrower than the rank, and a look at what it cannot see."""

from __future__ import annotations

import math
from contextlib import suppress

import torch
from torch import Generator, Tensor

from pissa_core.svd.forms import Apply, Form, Plain, best_form
from pissa_core.svd.krylov import Ritz, random_start
from pissa_core.svd.missing import reach
from pissa_core.svd.space import Space

BLOCK = 32
_LEAST = 80  # a rank for which as many vectors are held as for smaller ones


def fits_narrow(d: int, rank: int) -> bool:
    """Whether a narrow block is worth it: the rank is not narrow itself, and the basis fits."""
    return rank > BLOCK + BLOCK // 4 and 12 * rank <= d


def narrow_capacity(d: int, rank: int, most: int = Plain.most) -> int:
    """Return how many vectors the basis may hold, about `most` times the rank."""
    return min(most * max(rank, _LEAST), d // 2) // BLOCK * BLOCK


def few_eigenpairs(
    apply: Apply,
    d: int,
    rank: int,
    extra: int,
    *,
    tolerance: float,
    generator: Generator,
    device: torch.device,
    symmetric: bool = True,
) -> Ritz | None:
    """Find the `rank` leading eigenpairs of G by a Krylov space of few vectors, or give up.

    With as many products a narrow block makes polynomials of a higher degree: two thirds of the
    vectors do, no restart is needed, and the space follows a recurrence of three blocks; of a
    `Square` half of those do. But of a cluster with more members than the block is wide such a
    space shows no more than that many, and nothing in it tells. So before an answer counts, fresh
    random vectors look at G outside the space (`Space.ceiling`): what they meet bounds what is
    missing, members that hide included.

    Shapes   X -> X G for X (b, d), any b, in memory of its own; the Ritz pairs returned are
             rank + extra. Not `symmetric`: rounding makes of each product one with another
             matrix, and a `Square` would make too much of that.
    Dtype    as `leading_eigenpairs`.
    Error    `reach` bounds the optimum, given the ceiling, which is an estimate; what is captured
             lacks of that, with `by_rounding`, a share <= tolerance. None where
             `narrow_capacity` vectors do not reach that: spectra flat at theta_r, clusters wider
             than the block; or where a few values stand too far above all others.
    Random   the start, the fresh vectors, and directions for dependent ones: from `generator`.
    Cost     k vectors, 3.125 times the rank in whole blocks: 2 k products, 2 d k^2 flops of
             Gram-Schmidt, one or two problems of size k in float64; a look at the spectrum before,
             and one outside the space after it, of a hundred products each. Of G itself: 6.25
             times the rank, and k products.
    Source   Meyer, Musco, Musco 2024, arXiv:2305.02535 (narrow blocks need fewer products, up to
             the logarithm of gaps); the rest as `leading_eigenpairs`.
    """
    start = random_start(BLOCK, d, generator, device)
    plain = Plain(apply)
    form = best_form(apply, start, rank, tolerance, generator) if symmetric else plain
    for tried in (form,) if isinstance(form, Plain) else (form, plain):
        with suppress(_Unresolved):
            return _search(tried, start, rank, extra, tolerance, generator)
    return None


class _Unresolved(Exception):
    """A form does not tell theta_r from what is below it, as far as is seen."""


def _search(
    form: Form, start: Tensor, rank: int, extra: int, tolerance: float, generator: Generator
) -> Ritz | None:
    capacity = narrow_capacity(start.shape[1], rank, form.most)
    space = Space(form.apply, start, capacity, generator, look=form.look)
    usual = round((form.usual - form.decade * math.log10(tolerance / 1e-4)) * rank)
    wished = min(max(usual, 2 * rank + BLOCK), capacity)
    while wished <= capacity:
        space.expand_to(wished)
        values, S, couplings = space.ritz(rank, graded=form.graded)
        rounded = form.by_rounding(form.back(values), rank)
        if not rounded <= tolerance or float(values[rank - 1]) < form.least:
            raise _Unresolved
        optimum = _optimum(form, space, values, couplings, rank, tolerance - rounded)
        missed = rounded + _share(float(form.back(values[:rank]).sum()), optimum)
        if missed <= tolerance:
            values, V, residuals = form.pairs(space, values, S, couplings, rank + extra)
            missed = rounded + _share(float(values[:rank].sum()), optimum)
            if missed <= tolerance:
                return Ritz(values, V, residuals, missed, space.k // BLOCK)
        more = max(1, math.ceil(math.log(missed / tolerance) / math.log(form.gain)))
        wished = space.k + more * BLOCK
    return None


def _optimum(
    form: Form, space: Space, values: Tensor, couplings: Tensor, rank: int, tolerance: float
) -> float:
    """Bound the sum of the r largest eigenvalues of G.

    What is outside the space is looked for only if it could show that little is missing.
    """

    def given(ceiling: float) -> float:
        reached = reach(values, couplings, rank, rank + BLOCK - 1, ceiling)
        return float(form.back(reached).sum())

    hoped = given(float(values[2 * rank] + torch.linalg.vector_norm(couplings[:, 2 * rank])))
    if _share(float(form.back(values[:rank]).sum()), hoped) > tolerance:
        return hoped
    return max(hoped, given(space.ceiling()))


def _share(captured: float, optimum: float) -> float:
    # Of what is no number, all is missing.
    known = optimum > 0 and math.isfinite(captured)
    return max(0.0, 1 - captured / optimum) if known else 1.0
