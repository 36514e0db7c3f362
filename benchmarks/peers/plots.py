"""Plots as SVG that reads on light and dark pages: lines with marks, names beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

# Told apart by people who do not see red or green, on white and on black.
COLOURS = (
    *("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#b8860b", "#56a0d3", "#7a5cc0", "#888888"),
    *("#e34a6f", "#4d9221"),
)
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, NAMES = 860, 380, 64, 40, 52, 250
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
        label: what it shows, with its unit.
        ticks: ascending values that are labelled; the first and last are its ends.
        log: equal ratios are equally far apart.
    """

    label: str
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """0 at the first tick, 1 at the last."""
        ends = (self.ticks[0], self.ticks[-1])
        if self.log:
            low, high = (math.log(end) for end in ends)
            return (math.log(value) - low) / (high - low)
        return (value - ends[0]) / (ends[1] - ends[0])


def plot(title: str, x: Axis, y: Axis, lines: Mapping[str, Points], colours: Sequence[str]) -> str:
    """The plot. ``colours``: all names that ever have one, so that a peer keeps its own."""
    wide, high = WIDTH - LEFT - NAMES, HEIGHT - TOP - BOTTOM

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return LEFT + x.place(point[0]) * wide, TOP + (1 - y.place(point[1])) * high

    parts = [_text(LEFT, 22, title, "start", bold=True)]
    for value in x.ticks:
        across, _ = at((value, y.ticks[0]))
        parts.append(_text(across, HEIGHT - BOTTOM + 18, f"{value:g}", "middle"))
    for value in y.ticks:
        _, down = at((x.ticks[0], value))
        parts += [_line([(LEFT, down), (LEFT + wide, down)], "#888888", 0.4)]
        parts.append(_text(LEFT - 8, down + 4, f"{value:g}", "end"))
    parts.append(_text(LEFT + wide / 2, HEIGHT - 12, x.label, "middle"))
    parts.append(_text(LEFT, 36, y.label, "start"))
    for row, (name, points) in enumerate(lines.items()):
        colour = COLOURS[list(colours).index(name) % len(COLOURS)]
        places = [at(point) for point in points]
        parts.append(_line(places, colour, 2))
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}"/>' for a, b in places]
        down = TOP + 14 + 22 * row
        parts.append(f'<circle cx="{LEFT + wide + 22}" cy="{down}" r="5" fill="{colour}"/>')
        parts.append(_text(LEFT + wide + 34, down + 4, name, "start"))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="sans-serif" font-size="12"><title>{escape(title)}</title>\n'
        # A page that shows it as an image cannot lend it its colours.
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def nice_ticks(values: Sequence[float], *, zero: bool = True) -> tuple[float, ...]:
    """Five or so round values around these; from 0 with ``zero``."""
    low, high = (0.0 if zero else min(values)), max(values)
    rough = max(high - low, 1e-9) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return tuple(round(step * k, 10) for k in range(first, last + 1))


def _line(places: Points, colour: str, width: float) -> str:
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, anchor: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#222222"{weight}>'
        f"{escape(text)}</text>"
    )
