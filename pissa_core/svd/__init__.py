"""Truncated SVD: exact, PEFT's lowrank, and the cheapest route to a tolerance."""

from __future__ import annotations

from pissa_core.svd.truncated import TruncatedSvd, truncated_svd

__all__ = ["TruncatedSvd", "truncated_svd"]
