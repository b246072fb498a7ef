"""Which route to the leading triplets is the cheapest: a small cost model, measured."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pissa_core.svd.forms import Plain, Square
from pissa_core.svd.krylov import Shape
from pissa_core.svd.operator import Operator
from pissa_core.svd.products import times_transposed

# Share of the energy, a rank, that the roundings of rough products are expected to cost. Measured
# on Gaussian matrices of 2048: 1.6e-7 at rank 16 and 1e-6 at rank 1 with a heavy tail; without one
# 6e-6 and 8e-5. Where it is more than is allowed, the rough search is thrown away, and only time
# is lost.
NOISE = 1.9e-7
# The same where only the Gram matrix was formed roughly, its products are not.
GRAM_NOISE = 1e-7
ROOM = 4  # times what roundings are expected to cost must be allowed
# Products that a narrow block takes beside those of its basis: to look at the spectrum, outside the
# space, and at the result. These, and what follows, fit the times of matrices of 2048 and
# 5632 x 2048 at ranks 44 to 128.
_AROUND, _LOOK = 350, 60
_SKINNY = 1.2  # by which products of 32 rows fall behind full speed, rough ones behind float32's
_ROUGH_GRAM = 0.58  # what a Gram matrix costs in bfloat16
EXPECTED_STEPS = 9
_PATIENCE = 300  # a flat bulk of 2048 takes 25 steps; nothing met so far took a hundred
_NARROWEST = 16
_BASIS = 320  # vectors up to which the small problem is cheap
_LEAST_HELD = 4  # steps that a basis of wide blocks holds: with 3 it takes two steps more


def oversampling(rank: int) -> int:
    """Return how many vectors beyond the rank a block has.

    A narrow block can all but lack a direction: sixteen vectors cost little, and hide much less.
    """
    return max(8, _NARROWEST - rank, rank // 8)


def krylov_shape(d: int, rank: int) -> Shape:
    """Choose block, capacity and restart for the `rank` leading pairs of a d x d operator."""
    block = rank + oversampling(rank)
    keep = rank + max(8, 3 * rank // 4)
    capacity = keep + max(_LEAST_HELD, _BASIS // block) * block
    return Shape(block, keep, capacity, _PATIENCE)


def fits_krylov(d: int, rank: int) -> bool:
    """Whether a Krylov basis is small against d; if not, all of the Gram matrix is solved."""
    block = krylov_shape(d, rank).block
    return 2 * block * min(EXPECTED_STEPS, max(_LEAST_HELD, _BASIS // block + 1)) <= d


def products_for_few(
    operator: Operator, rank: int, tolerance: float, *, may_be_rough: bool
) -> tuple[Products, float]:
    """Choose the cheapest products for `few_eigenpairs`; also return what their roundings cost.

    Flops, in float32's price at full speed: 4 D d a product with W, 2 d^2 with the Gram matrix,
    which costs 1.1 D d^2 once, or half of that roughly; 10 d k^2 for Gram-Schmidt and the small
    problem of k vectors; and to refine what is rough. Rough products with W are of no matrix at
    all, since each vector is rounded anew: a `Square` of them would drown in that, and twice the
    vectors are needed.
    """
    D, d = operator.long, operator.short
    with_squares = 2 * Square.usual * rank + _AROUND
    square, plain = (10 * d * (form.usual * rank) ** 2 for form in (Square, Plain))
    gram, from_gram = 1.1 * D * d * d, _SKINNY * 2 * d * d * with_squares + square
    ways = [
        (_SKINNY * 4 * D * d * with_squares + square, 0.0, False, False),
        (gram + from_gram, 0.0, False, True),
    ]
    if may_be_rough:
        refining = 3 * D * d * (rank + 2 * oversampling(rank))
        direct = _SKINNY * 4 * D * d * (Plain.usual * rank + _LOOK) + plain
        ways += [
            (direct + refining, NOISE * rank, True, False),
            (_ROUGH_GRAM * gram + from_gram + refining, GRAM_NOISE * rank, True, True),
        ]
    _, noise, roughly, form = min(way for way in ways if ROOM * way[1] <= tolerance)
    G = operator.gram(roughly=roughly) if form else None
    return Products(operator, G, may_form=False, roughly=roughly), noise


@dataclass(slots=True)
class Products:
    """Products with M^T M: from W, or from a Gram matrix once that has become the cheaper way.

    Flops a step for b vectors: 4 D d b from W, 2 d^2 b from the Gram matrix, which costs D d^2
    once; rough products with W cost half of that, those with the Gram matrix are always in float32.
    It is formed at the start where EXPECTED_STEPS steps repay it, and later once the steps
    taken have cost as much (then at most twice the best choice made in hindsight was spent).
    """

    operator: Operator
    gram: Tensor | None = None
    spent: float = 0.0
    may_form: bool = True
    roughly: bool = False

    @property
    def symmetric(self) -> bool:
        """Whether these are products of one matrix, as rough ones with W are not."""
        return self.gram is not None or not self.roughly

    @property
    def method(self) -> str:
        """The name of the route that was taken."""
        return "krylov" if self.gram is None else "gram-krylov"

    def apply(self, X: Tensor) -> Tensor:
        """Return X M^T M."""
        if self.gram is None and self.may_form and self._pays(len(X)):
            self.gram = self.operator.gram(roughly=self.roughly)
        if self.gram is not None:
            return times_transposed(X, self.gram)
        self.spent += self._saved(len(X))
        return self.operator.apply_roughly(X) if self.roughly else self.operator.apply(X)

    def _saved(self, b: int) -> float:
        D, d = self.operator.long, self.operator.short
        narrow = (b + 10) / b  # skinny products run below full speed
        return max(0.0, (4 * D * d * b * self._price - 2 * d * d * b) * narrow)

    @property
    def _price(self) -> float:
        return 0.5 if self.roughly else 1.0

    def _pays(self, b: int) -> bool:
        if self.operator.tensor_cores:
            return True  # ten times the speed of float32: cheaper than two steps
        cost = self.operator.long * self.operator.short**2 * 1.1 * self._price
        return EXPECTED_STEPS * self._saved(b) >= cost or self.spent >= cost
