"""Whether a trained and an initial adapter belong together; if not, what differs."""

from __future__ import annotations

import math

from pissa_core.errors import AdaptersDoNotMatch
from pissa_core.lora.adapter import Adapter

_HINT = "the initial adapter is the one that training began with, pissa_init/ beside the residual"
_SCALING_HINT = "lora_alpha, alpha_pattern and use_rslora must be as when training began"
_SAME = 1e-9
"""Relative; scalings are quotients of the same numbers, perhaps formed another way."""


def check_match(trained: Adapter, initial: Adapter) -> None:
    """Compare modules, shapes, ranks and scalings.

    Raises:
        AdaptersDoNotMatch: naming what differs, by the first module of which it is true.
    """
    _check_modules(trained, initial)
    for module, pair in trained.pairs.items():
        other = initial.pairs[module]
        if pair.shape != other.shape:
            raise _differ(module, "adapts a matrix of shape", list(pair.shape), list(other.shape))
        if pair.rank != other.rank:
            raise _differ(module, "has rank", pair.rank, other.rank)
        if not math.isclose(pair.scaling, other.scaling, rel_tol=_SAME):
            raise _differ(
                module, "has scaling", f"{pair.scaling:.6g}", f"{other.scaling:.6g}", _SCALING_HINT
            )


def _check_modules(trained: Adapter, initial: Adapter) -> None:
    for one, other, has, lacks in (
        (trained, initial, "trained", "initial"),
        (initial, trained, "initial", "trained"),
    ):
        missing = [module for module in one.pairs if module not in other.pairs]
        if missing:
            raise AdaptersDoNotMatch(
                f"the targets differ: the {has} adapter has {missing[0]}"
                f"{f' and {len(missing) - 1} more' * (len(missing) > 1)}, "
                f"which the {lacks} one has not",
                hint=_HINT,
            )


def _differ(
    module: str, what: str, trained: object, initial: object, hint: str = _HINT
) -> AdaptersDoNotMatch:
    return AdaptersDoNotMatch(
        f"{module} {what} {trained} in the trained adapter and {initial} in the initial one",
        hint=hint,
    )
