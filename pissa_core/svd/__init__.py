"""Truncated SVD: exact, PEFT's lowrank, and the cheapest route to a tolerance."""

from __future__ import annotations

from pissa_core.svd.missing import RESOLUTION
from pissa_core.svd.truncated import TruncatedSvd, truncated_svd

__all__ = ["RESOLUTION", "TruncatedSvd", "truncated_svd"]
