"""Line charts as inline SVG: no script, no font, no file from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 480, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 22, 12, 40
MAX_POINTS = 300
"""Points of a line; more are averaged in groups, so that a page stays small however long the run was."""
STYLES = (
    ("#0072b2", ""), ("#d55e00", ""), ("#009e73", ""), ("#cc79a7", ""),
    ("#0072b2", "6 3"), ("#d55e00", "6 3"), ("#009e73", "6 3"), ("#cc79a7", "6 3"),
)  # fmt: skip
"""Colours that people with a colour vision deficiency can tell apart (Okabe and Ito 2008), then the same, dashed."""

Points = Sequence[tuple[float, float]]


def chart(title: str, x_name: str, y_name: str, lines: Mapping[str, Points], marks: Sequence[float] = ()) -> str:
    """A figure with its legend; an empty string where there is nothing to draw.

    Args:
        lines: name -> (x, y); values that are not finite are left out.
        marks: x of vertical dotted lines (restarts).
    """
    drawn = {
        name: thinned([(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)])
        for name, points in lines.items()
    }
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_range, y_range = (min(xs), max(xs)), (y_ticks[0], y_ticks[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_range[0]) / ((x_range[1] - x_range[0]) or 1.0)
        up = (y - y_range[0]) / ((y_range[1] - y_range[0]) or 1.0)
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for y in y_ticks:
        _, top = at(x_range[0], y)
        parts.append(f'<path class="grid" d="M{_LEFT} {top:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{top + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in (tick for tick in x_ticks if x_range[0] <= tick <= x_range[1]):
        left, _ = at(x, y_range[0])
        parts.append(f'<text x="{left:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{number(x)}</text>')
    for x in (mark for mark in marks if x_range[0] <= mark <= x_range[1]):
        left, _ = at(x, y_range[0])
        parts.append(f'<path class="mark" d="M{left:.1f} {_TOP}V{HEIGHT - _BOTTOM}"/>')
    legend = []
    for (name, points), (colour, dash) in zip(drawn.items(), _styles(len(drawn)), strict=True):
        stroke = f'stroke="{colour}" stroke-dasharray="{dash}"'
        places = [at(x, y) for x, y in points]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path class="line" {stroke} d="{path}"/>')
        if len(places) <= 30:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in places]
        key = f'<svg class="key" viewBox="0 0 24 8"><path {stroke} d="M0 4H24"/></svg>'
        legend.append(f"<li>{key}{escape(name)}</li>")
    parts.append(f'<text x="{WIDTH - _RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(x_name)}</text></svg>')
    caption = f"<figcaption><b>{escape(title)}</b> {escape(y_name)}</figcaption>"
    return f'<figure>{caption}{"".join(parts)}<ul class="legend">{"".join(legend)}</ul></figure>'


def thinned(points: Points) -> list[tuple[float, float]]:
    """At most ``MAX_POINTS`` points; each is the mean of a group of neighbours."""
    size = -(-len(points) // MAX_POINTS) if points else 1
    groups = [points[first : first + size] for first in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers that enclose [low, high]."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # equal but for rounding
        low, high = low - (abs(low) or 1.0) * 0.5, high + (abs(high) or 1.0) * 0.5
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [position * step for position in range(first, last + 1)]


def number(value: float) -> str:
    """A number as short as an axis needs it."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "K")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'K' else size):.4g}{suffix}"
    return f"{value:.4g}"


def _styles(count: int) -> list[tuple[str, str]]:
    return [STYLES[position % len(STYLES)] for position in range(count)]
