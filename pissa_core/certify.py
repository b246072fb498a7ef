"""Measured errors of a split, and what each of them bounds or estimates."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was measured of one matrix.

    Attributes:
        sigma: the r leading singular values.
        energy: share of ||W||_F^2 that they capture.
        missed: upper estimate of the share of the optimal energy that is missing.
        recombination_error: ||W - (R + s B A)||_F / ||W||_F with everything as stored.
        method: the route taken.
    """

    sigma: tuple[float, ...]
    energy: float
    missed: float
    recombination_error: float
    method: str

    def as_row(self) -> dict[str, object]:
        """Return the fields as JSON-able values, for a row of the manifest."""
        return {
            "sigma": list(self.sigma),
            "energy": self.energy,
            "missed": self.missed,
            "recombination_error": self.recombination_error,
            "method": self.method,
        }
