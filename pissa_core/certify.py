"""Measured errors of a split: what each figure bounds, and what it estimates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pissa_core.svd import RESOLUTION, TruncatedSvd


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was measured of one matrix.

    Attributes:
        sigma: the r leading singular values, as found.
        energy: sum sigma^2 / ||W||_F^2, the share of the energy that the adapter took. Measured;
            right to float32 rounding.
        missed: share of the best possible sum of r sigma^2 that is missing, from above. **An
            estimate**, or a bound that rests on one: see `pissa_core.svd.missing`. Never below
            RESOLUTION = 4e-6.
        sigma_error: for each sigma, a distance within which W has a singular value. **A bound**
            (Weyl), up to float32 rounding, since it is the norm of the residual W v - sigma u or
            W^T u - sigma v; it does not say that it is the i-th largest.
        orthogonality: the largest |entry| of U^T U - I and V^T V - I. Measured.
        recombination_error: ||W - (R + s B A)||_F / ||W||_F with everything as stored. Measured.
        method: the route taken.
    """

    sigma: tuple[float, ...]
    energy: float
    missed: float
    sigma_error: tuple[float, ...]
    orthogonality: float
    recombination_error: float
    method: str

    def as_row(self) -> dict[str, object]:
        """Return the fields as JSON-able values, for a row of the manifest.

        Of the errors of sigma only the worst is told, relative to the largest sigma.
        """
        largest = self.sigma[0] if self.sigma else 0.0
        return {
            "sigma": list(self.sigma),
            "energy": self.energy,
            "missed": self.missed,
            "sigma_error": max(self.sigma_error) / largest if largest > 0 else 0.0,
            "orthogonality": self.orthogonality,
            "recombination_error": self.recombination_error,
            "method": self.method,
        }


def certify(found: TruncatedSvd, residuals: Tensor, discrepancy: float) -> Certificate:
    """Put together what is known of a split.

    Args:
        found: the truncated SVD of W.
        residuals: (r,) norms of the side that does not hold by construction.
        discrepancy: ||W - (R + s B A)||_F as stored.
    """
    sigma = found.S.double()
    captured = float(sigma.square().sum())
    return Certificate(
        sigma=tuple(sigma.tolist()),
        energy=min(1.0, captured / found.norm / found.norm) if found.norm > 0 else 0.0,
        missed=_missed(captured, found.optimum),
        sigma_error=tuple(residuals.double().tolist()),
        orthogonality=max(_defect(found.U.t()), _defect(found.Vt)),
        recombination_error=discrepancy / found.norm if found.norm > 0 else 0.0,
        method=found.method,
    )


def _missed(captured: float, optimum: float) -> float:
    # A zero matrix has no energy to miss.
    if optimum == 0.0:
        return 0.0
    share = 1 - captured / optimum
    return min(1.0, max(0.0, share) + RESOLUTION) if math.isfinite(share) else 1.0


def _defect(rows: Tensor) -> float:
    gram = torch.mm(rows, rows.t())
    gram.diagonal().sub_(1)
    return float(gram.abs().max())
