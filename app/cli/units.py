"""Sizes, times and shares as people read them."""

from __future__ import annotations

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def size(nbytes: float) -> str:
    """Write bytes with a decimal unit and three digits: ``2.20 GB``.

    >>> size(2_200_000_000), size(999), size(1_500)
    ('2.20 GB', '999 B', '1.50 kB')
    """
    value, unit = float(nbytes), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    if unit == 0:
        return f"{value:.0f} B"
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {_UNITS[unit]}"


def duration(seconds: float) -> str:
    """Write seconds as the two units that matter: ``41 s``, ``3 min 05 s``, ``2 h 07 min``.

    >>> duration(41.2), duration(185), duration(7620)
    ('41 s', '3 min 05 s', '2 h 07 min')
    """
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count(number: int) -> str:
    """Write a large count shortly, with its exact value: ``39,976,960 (40.0 M)``.

    >>> count(512), count(39_976_960)
    ('512', '39,976,960 (40.0 M)')
    """
    for limit, letter in ((10**9, "G"), (10**6, "M")):
        if number >= limit:
            return f"{number:,} ({number / limit:.1f} {letter})"
    return f"{number:,}"
