"""pissa_report/*.svg: spectra and the map of captured energy, drawn by hand.

No plotting library: these files must be small, the same for the same job, and readable on
light and dark pages. Size is bounded however many matrices there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from pissa_core.plan import Plan
from pissa_core.report.figures import Row, by_kind, energy_share, in_plan_order, places

SPECTRA = "pissa_report/spectra.svg"
ENERGY = "pissa_report/energy.svg"

# Bounds: at most 24 panels of 24 lines of 24 points, and a map of 40 by 128 cells.
_MOST_PANELS = _MOST_LINES = _MOST_POINTS = 24
_MOST_KINDS, _MOST_COLUMNS = 40, 128
_FLOOR = 1e-6

_STYLE = (
    "<style>text{font:11px system-ui,sans-serif;fill:#57606a}.t{font-weight:600;fill:#24292f}"
    ".f{fill:none;stroke:#d0d7de}.l{fill:none;stroke-width:1;stroke-opacity:.75}"
    "@media(prefers-color-scheme:dark){text{fill:#9198a1}.t{fill:#e6edf3}.f{stroke:#3d444d}}"
    "</style>"
)


def pictures(plan: Plan, rows: Sequence[Row]) -> dict[str, bytes]:
    """Return the pictures of a result by their path in it."""
    ordered = in_plan_order(plan, rows)
    drawn = {SPECTRA: spectra(ordered), ENERGY: energy_map(ordered)}
    return {path: text.encode(errors="replace") for path, text in drawn.items()}


def spectra(rows: Sequence[Row]) -> str:
    """Draw σ_i / σ_1 against i, both logarithmic, a panel a kind, a line a matrix."""
    groups = list(by_kind(rows).items())
    shown = groups[:_MOST_PANELS]
    lowest = _lowest_ratio(rows)
    width, height, columns = 200, 150, 4
    body = []
    for number, (kind, group) in enumerate(shown):
        x, y = 20 + number % columns * (width + 30), 56 + number // columns * (height + 44)
        body.append(_panel(kind, group, x, y, width, height, lowest))
    depth = -(-len(shown) // columns) * (height + 44)
    note = f"; {len(shown)} of {len(groups)} kinds" if len(groups) > len(shown) else ""
    title = (
        f"Singular values σi/σ1 of the adapter, log–log, down to {lowest:.0e}; "
        f"first layer violet, last layer orange{note}"
    )
    return _svg(20 + columns * (width + 30), 60 + depth, title, body)


def energy_map(rows: Sequence[Row]) -> str:
    """Draw the share of energy captured: a row a kind, a column a layer (or a few layers)."""
    cells: dict[tuple[str, int], list[Row]] = {}
    for row, place in zip(rows, places(rows), strict=True):
        cells.setdefault((place.kind, place.layer), []).append(row)
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    layers = sorted({layer for _, layer in cells})
    step = -(-len(layers) // _MOST_COLUMNS)
    columns = [layers[first : first + step] for first in range(0, len(layers), step)]
    shares = {kind: energy_share(group) for kind, group in by_kind(rows).items()}
    side = 18 if len(columns) <= 40 else 8
    left = 30 + 7 * max(len(kind) for kind in kinds[:_MOST_KINDS])
    body = []
    for line, kind in enumerate(kinds[:_MOST_KINDS]):
        y = 52 + 20 * line
        body.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(kind)}</text>')
        for number, column in enumerate(columns):
            group = [row for layer in column for row in cells.get((kind, layer), [])]
            body.append(_cell(group, column, left + number * side, y, side))
        end = left + len(columns) * side + 8
        body.append(f'<text x="{end}" y="{y + 13}">{_percent(shares[kind])}</text>')
    depth = 52 + 20 * len(kinds[:_MOST_KINDS])
    body.append(
        f'<text x="{left}" y="{depth + 14}">layer {layers[0]} → {layers[-1]}; '
        "a full square is 100 %</text>"
    )
    left_out = len(kinds) - _MOST_KINDS
    note = f"; {left_out} more kinds are in the manifest" if left_out > 0 else ""
    width = max(left + len(columns) * side + 70, 560)
    return _svg(width, depth + 26, f"Share of ‖W‖² captured by the adapter{note}", body)


def _panel(
    kind: str, group: Sequence[Row], x: int, y: int, width: int, height: int, lowest: float
) -> str:
    chosen = _evenly(group, _MOST_LINES)
    parts = [
        f'<text class="t" x="{x}" y="{y - 6}">{escape(kind)}</text>',
        f'<rect class="f" x="{x}" y="{y}" width="{width}" height="{height}"/>',
    ]
    longest = max(len(row["sigma"]) for row in group)
    for number, row in enumerate(chosen):
        # Violet (270°) for the first layer to orange (30°) for the last, through blue and green.
        hue = 270 - 240 * number // max(len(chosen) - 1, 1)
        points = _points(row["sigma"], longest, x, y, width, height, lowest)
        if points:
            parts.append(f'<polyline class="l" stroke="hsl({hue},65%,50%)" points="{points}"/>')
    parts.append(f'<text x="{x + width}" y="{y + height + 14}" text-anchor="end">{longest}</text>')
    return "".join(parts)


def _points(
    sigma: Sequence[float], longest: int, x: int, y: int, width: int, height: int, lowest: float
) -> str:
    if sigma[0] <= 0:
        return ""
    places = []
    for i in _log_spaced(len(sigma)):
        across = math.log(i + 1) / math.log(longest) if longest > 1 else 0.5
        ratio = max(sigma[i] / sigma[0], lowest)
        down = math.log(ratio) / math.log(lowest)
        places.append(f"{x + width * across:.0f},{y + height * down:.1f}")
    if len(places) == 1:  # a line needs two ends
        places.append(f"{x + width},{places[0].partition(',')[2]}")
    return " ".join(places)


def _cell(group: Sequence[Row], layers: Sequence[int], x: int, y: int, side: int) -> str:
    if not group:
        return ""
    share = energy_share(group)
    name = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}–{layers[-1]}"
    return (
        f'<rect x="{x}" y="{y}" width="{side - 1}" height="18" fill="#8250df" '
        f'fill-opacity="{0.06 + 0.94 * (share or 0):.3f}"><title>{name}: {_percent(share)}'
        "</title></rect>"
    )


def _lowest_ratio(rows: Sequence[Row]) -> float:
    """Return the power of ten below every σ_i/σ_1, within [1e-6, 0.1]."""
    ratios = [row["sigma"][-1] / row["sigma"][0] for row in rows if row["sigma"][0] > 0]
    smallest = min((ratio for ratio in ratios if ratio > 0), default=0.1)
    return float(max(10.0 ** math.floor(math.log10(min(smallest, 0.1))), _FLOOR))


def _log_spaced(count: int) -> list[int]:
    """Choose at most `_MOST_POINTS` indices below `count`, evenly spaced on a log axis."""
    if count <= _MOST_POINTS:
        return list(range(count))
    last = _MOST_POINTS - 1
    return sorted({round(count ** (step / last)) - 1 for step in range(_MOST_POINTS)})


def _evenly(rows: Sequence[Row], most: int) -> list[Row]:
    if len(rows) <= most:
        return list(rows)
    return [rows[number * (len(rows) - 1) // (most - 1)] for number in range(most)]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _svg(width: int, height: int, title: str, body: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img">{_STYLE}'
        f'<text class="t" x="20" y="24">{escape(title)}</text>' + "\n".join(body) + "</svg>\n"
    )
