"""The bound that every entry of a target must keep, and the figures of a whole matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pissa_core.svd.products import times_transposed

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""The unit roundoff u of each dtype."""

_U32 = UNIT[torch.float32]
_SUBNORMAL = {torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}


@dataclass(slots=True)
class Recombination:
    """Holds W against R + scaling · B · A, panel by panel of stored rows.

    Bound    ``faithful``: R = round(W - s·B·A), formed in float32 from the factors as stored, so
             |W - (R + s·B·A)| <= u (1 + 2u) |R| + tiny
               + 2^-24 [4 |W| + 4 |R| + (2 r + 6) s ||b_i|| ||a_j||]
             for an entry in row i and column j, with u the unit roundoff of R's dtype, tiny half
             its smallest subnormal, b_i a row of B and a_j a column of A. The bracket is the
             float32 arithmetic of whoever converted and of this check: sum_k |b_ik| |a_kj| <=
             ||b_i|| ||a_j|| (Cauchy-Schwarz), and r products are summed with an error of at most
             r 2^-24 of that, twice (Higham 2002, Accuracy and Stability, section 3.1).
             ``peft``: R was formed from factors that were rounded to W's dtype only afterwards,
             which adds s [2.1 u ||b_i|| ||a_j|| + 2^-25 sqrt(r) (||b_i|| + ||a_j||) in float16].

    Attributes:
        left, right: (rows, r) and (columns, r) float32, so that a panel of the stored
            s·B·A is scaling * left[i:j] @ right.T.
        rounding: u of the factors where they were rounded after R was formed; 0 for faithful.
        worst: the largest |error| / bound seen, and where.
    """

    left: Tensor
    right: Tensor
    scaling: float
    dtype: torch.dtype
    rounding: float
    worst: float = 0.0
    place: tuple[int, int] = (0, 0)
    _energy: float = 0.0
    _apart: float = 0.0
    _norms: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        sides = (self.left, self.right)
        norms = [torch.linalg.vector_norm(side, dim=1) for side in sides]
        self._norms = norms[0], norms[1]

    def add(self, start: int, W: Tensor, R: Tensor) -> None:
        """Take account of the stored rows from `start` on; W and R (rows, columns)."""
        stop = start + len(W)
        wide, rest = W.float(), R.float()
        product = times_transposed(self.left[start:stop], self.right)
        error = torch.sub(wide, rest).sub_(product, alpha=self.scaling)
        self._energy += _square(wide)
        self._apart += _square(error)
        ratio = error.abs_().div_(self._bound(start, stop, wide.abs_(), rest.abs_()))
        # A NaN is no distance that keeps a bound.
        ratio.nan_to_num_(nan=math.inf, posinf=math.inf)
        largest = int(ratio.argmax())
        found = float(ratio.view(-1)[largest])
        if found > self.worst:
            row, column = divmod(largest, ratio.shape[1])
            self.worst, self.place = found, (start + row, column)

    def _bound(self, start: int, stop: int, W: Tensor, R: Tensor) -> Tensor:
        rank, u = self.left.shape[1], UNIT[self.dtype]
        rows, columns = self._norms[0][start:stop], self._norms[1]
        scaling = abs(self.scaling)
        per_product = _U32 * (2 * rank + 6) + 2.1 * self.rounding
        bound = torch.outer(rows, columns).mul_(scaling * per_product)
        bound.add_(R, alpha=u * (1 + 2 * u) + 4 * _U32).add_(W, alpha=4 * _U32)
        if self.rounding and self.dtype == torch.float16:
            bound.add_(rows[:, None] + columns, alpha=scaling * 2.0**-25 * math.sqrt(rank))
        # In float32 the least normal number stands for what is smaller.
        return bound.add_(max(_SUBNORMAL[self.dtype], 2.0**-126))

    @property
    def norm(self) -> float:
        """||W||_F."""
        return math.sqrt(self._energy)

    @property
    def error(self) -> float:
        """||W - (R + s·B·A)||_F / ||W||_F."""
        return math.sqrt(self._apart) / self.norm if self.norm > 0 else 0.0

    def sigma(self) -> list[float]:
        """Return scaling ||b_i|| ||a_i||: the singular values, since B and A are √σ of U and V."""
        lengths = [
            torch.linalg.vector_norm(side.double(), dim=0) for side in (self.left, self.right)
        ]
        values: list[float] = (lengths[0] * lengths[1] * abs(self.scaling)).tolist()
        return values


def _square(rows: Tensor) -> float:
    return float(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square().sum())
