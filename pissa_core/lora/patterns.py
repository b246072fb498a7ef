"""PEFT's `rank_pattern` and `alpha_pattern`: which value a module gets; first match wins.

The same as `peft.utils.other.get_pattern_key`, to which the tests hold it, without the seconds
that importing PEFT takes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

Number = TypeVar("Number", int, float)


def value_for(module: str, patterns: Mapping[str, Number], default: Number) -> Number:
    """Return the value of the first pattern that matches a module's path or an ending of it."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return patterns.get(module, default)


def one_module(module: str) -> str:
    """Return a pattern that matches this module alone, not another that ends like it."""
    return f"^{re.escape(module)}"


def order_free(
    patterns: Mapping[str, Number], default: Number, modules: Iterable[str]
) -> dict[str, Number]:
    """Return patterns that mean the same when sorted, as PEFT sorts them when it saves."""
    resorted = dict(sorted(patterns.items()))
    values = {module: value_for(module, patterns, default) for module in modules}
    if all(value_for(module, resorted, default) == value for module, value in values.items()):
        return resorted
    explicit = {one_module(m): value for m, value in values.items() if value != default}
    return dict(sorted(explicit.items()))
