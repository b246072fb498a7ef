"""What a Krylov space is made of: products with G, or with the square of G - c."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from pissa_core.svd.products import times, times_transposed
from pissa_core.svd.space import Space

_EPS = torch.finfo(torch.float32).eps
_SCOUTS = 3
_STEEPEST = 400  # theta_1 / theta_r up to which a `Square` was measured
_CUT = 2.5  # times the rank: the eigenvalue that becomes 2c; from 1.5 to 6 little depends on it

Apply = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Plain:
    """G itself; what every form says of itself is explained here.

    Attributes:
        apply: X -> X G, float32, in memory of its own.
    """

    apply: Apply

    # Vectors, in multiples of the rank, after which a tolerance of 1e-4 is usually met: the bound
    # falls steeply once what is outside the space is below theta_r, and a problem solved before
    # that is wasted. Each decade of tolerance is worth half a rank.
    usual: ClassVar[float] = 6.25
    decade: ClassVar[float] = 0.5
    most: ClassVar[int] = 8  # the same, of the rank or of 80, at which a search gives up
    gain: ClassVar[float] = 2.2  # by which a step cuts what is missing, where it is hard
    look: ClassVar[int] = 6  # steps of `Space.ceiling`
    graded: ClassVar[bool] = False
    least: ClassVar[float] = -math.inf  # below it, one value of the form is two of G
    # |G v - theta v| that float32 leaves of a Ritz vector, relative to the largest eigenvalue:
    # measured where one of 1000 stood above ones.
    rounded: ClassVar[float] = 64 * _EPS

    def back(self, mu: Tensor) -> Tensor:
        """Return the eigenvalues of G, given those of the form."""
        return mu.clamp(min=0)

    def by_rounding(self, values: Tensor, rank: int) -> float:
        """Estimate the share of the energy that float32 products cost, by their error e in G v.

        It costs e^2 / (theta_i - lambda) of a pair, and never more than theta_i; lambda is taken
        to be at most three quarters of theta_i, since roundings do not prefer the leading ones.

        Shapes   values (k,) the eigenvalues theta of G, descending, k >= rank.
        """
        error = self.rounded * float(values[0])
        kept = values[:rank].clamp(min=0)
        lost = torch.minimum(kept, 4 * error * error / kept.clamp(min=error))
        return float(lost.sum() / kept.sum()) if float(kept.sum()) != 0 else 0.0

    def pairs(
        self, space: Space, values: Tensor, S: Tensor, couplings: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return eigenvalues of G, the first (count, d) vectors, and G v - theta v of these."""
        residuals = torch.mm(couplings[:, :count].t().float(), space.newest)
        return values, space.vectors(S, count), residuals


@dataclass(frozen=True, slots=True)
class Square:
    """p(G) = (G - c)^2, which has the eigenvectors of G, at two products with G each.

    Beyond 2c it grows, and below that it stays within [0, c^2]: a Chebyshev polynomial of degree
    two on [0, 2c]. With 2c somewhat below theta_r the Krylov space of p(G) holds, for a number of
    vectors, polynomials of twice the degree, and of those all that matter: of heavy-tailed spectra
    3.125 r vectors show what 6.25 r of G itself do. Gram-Schmidt, quadratic in that number, and the
    small problem, cubic, become cheap; products are about as many.

    Attributes:
        multiply: X -> X G, float32, in memory of its own.
        center: c >= 0. Where 2c > theta_r nothing wrong is said, but what is between the two
            counts as missing, however many vectors there are.

    Source   Chebyshev filters: Saad 2011, "Numerical Methods for Large Eigenvalue Problems",
             ch. 7; squares of a shifted operator: Wang, Zunger 1994, doi:10.1063/1.466486.
    """

    multiply: Apply
    center: float

    usual: ClassVar[float] = 3.125
    decade: ClassVar[float] = 0.25
    most: ClassVar[int] = 5
    gain: ClassVar[float] = 4.8
    look: ClassVar[int] = 4
    graded: ClassVar[bool] = True
    # |p(G) v - mu v| near theta_r, relative to the largest mu: up to 0.65 eps was met, where the
    # largest theta stood 100 to 10000 times above the others.
    rounded: ClassVar[float] = 2 * _EPS

    def apply(self, X: Tensor) -> Tensor:
        """Return X (G - c)^2, for X (b, d)."""
        Y = self.multiply(X).sub_(X, alpha=self.center)
        return self.multiply(Y).sub_(Y, alpha=self.center)

    @property
    def least(self) -> float:
        """As `Plain.least`."""
        return 1.001 * self.center**2

    def back(self, mu: Tensor) -> Tensor:
        """Bound the i-th largest eigenvalue of G by the i-th largest of p(G)."""
        return self.center + mu.clamp(min=self.center**2).sqrt()

    def by_rounding(self, values: Tensor, rank: int) -> float:
        """Estimate the share by which float32 may lower the bound of the optimum.

        What is captured is measured, the bound rests on T and couplings, in which there is an
        error e of p(G) v. To the second order it moves mu_i by e^2 / (mu_i - mu_lambda), never by
        more than e, and theta_i by that over 2 (theta_i - c); lambda is taken to be theta_2r at
        most, since roundings do not prefer the few between.

        To the first order it moves mu_i by v^T e, and there is nothing for it. *Hypothesis*: e
        does not prefer v. Measured against float64, v^T e was 0.01 eps of the largest mu, of any
        sign, and all r of them together 1e-6 of the energy with spikes of 200 times theta_r, 3e-6
        with 400 times: `RESOLUTION` covers that. Steeper spectra are refused.

        Shapes   values (k,) the eigenvalues theta of G, descending, k > 2 r.
        """
        theta = values.clamp(min=2 * self.center)
        if not float(values[0]) <= _STEEPEST * float(theta[rank - 1]):
            return math.inf
        mu = (theta - self.center).square()
        error = self.rounded * float(mu[0])
        gap = (mu[:rank] - mu[2 * rank]).clamp(min=error)
        slope = (2 * mu[:rank].sqrt()).clamp(min=math.sqrt(error))
        return float((error * error / gap / slope).sum() / theta[:rank].sum())

    def pairs(
        self, space: Space, values: Tensor, S: Tensor, couplings: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Plain.pairs`, by a product with G: what is captured is less than `back` says.

        A unit vector with v^T p(G) v = mu has v^T G v <= back(mu), as p is convex (Jensen).
        """
        V = space.vectors(S, count)
        Y = self.multiply(V)
        T = times_transposed(V, Y).double()
        theta, E = torch.linalg.eigh((T + T.t()) / 2)
        theta, turn = theta.flip(0), E.flip(1).t().float()
        V = times(turn, V)
        return theta, V, times(turn, Y).sub_(theta.float()[:, None] * V)

    def resolves(self, largest: float, rth: float, tolerance: float) -> bool:
        """Whether `by_rounding` may be expected to leave room, given theta_1 and theta_r."""
        return self.rounded * largest**2 <= math.sqrt(tolerance) * rth**2 / 2


Form = Plain | Square


def best_form(
    apply: Apply, start: Tensor, rank: int, tolerance: float, generator: Generator
) -> Form:
    """Choose what to make a Krylov space of, by a look at the spectrum.

    The Ritz values of a few steps, each with the share of the start that lies in its vector, are a
    Gauss quadrature of the density of eigenvalues: how many lie above which value.

    Shapes   as `few_eigenpairs`; start (b, d) orthonormal rows, uniform.
    Error    any theta_i of a heavy tail to a few hundredths; across a gap it may be anything
             between its ends. A bad choice costs time, no accuracy.
    Random   what replaces dependent directions: from `generator`.
    Cost     three products with the start.
    Source   Golub, Meurant 2010, "Matrices, Moments and Quadrature with Applications", ch. 6 and
             11; Lin, Saad, Yang 2016, doi:10.1137/130934283.
    """
    b, d = start.shape
    scout = Space(apply, start, _SCOUTS * b, generator)
    scout.expand_to(_SCOUTS * b)
    values, S, _ = scout.ritz(1)
    members = S[:b].square().sum(dim=0) * (d / b)
    above = members.cumsum(dim=0) - members / 2
    square = Square(apply, max(0.0, _at(above, values, _CUT * rank)) / 2)
    below = float(values[int((above < rank).sum().clamp(max=len(values) - 1))])
    return square if square.resolves(float(values[0]), below, tolerance) else Plain(apply)


def _at(above: Tensor, values: Tensor, count: float) -> float:
    """Return the value above which there are `count`, between the nodes by a straight line."""
    i = int((above < count).sum().clamp(1, len(values) - 1))
    share = float((count - above[i - 1]) / (above[i] - above[i - 1]))
    share = min(1.0, max(0.0, share))
    return float(values[i - 1]) * (1 - share) + float(values[i]) * share
