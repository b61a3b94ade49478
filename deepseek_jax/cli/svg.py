"""Pictures as SVG text, without a plotting library: axes, curves, dots and their legend."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH = 760  # pixels
LEFT, RIGHT = 56, 20  # margins
BLUE, ORANGE, GREY = "#2166ac", "#d6604d", "#777777"

Points = list[tuple[float, float]]  # (x, value)


class Panel(NamedTuple):
    """One pair of axes: from `top` to `bottom`, values from `low` to `high`, x from 0 to `last`."""

    top: float
    bottom: float
    low: float
    high: float
    last: float

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / self.last

    def y(self, value: float) -> float:
        share = (min(value, self.high) - self.low) / (self.high - self.low)
        return self.bottom - (self.bottom - self.top) * share


def picture(height: float, title: str, parts: Sequence[str]) -> str:
    """The text of an SVG."""
    return (
        "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
                f' width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="12">',
                f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
                label(LEFT, 20, title, size=14),
                *parts,
                "</svg>",
            ]
        )
        + "\n"
    )


def span(values: Sequence[float], floor: float | None) -> tuple[float, float]:
    """Round ends of an axis for these values, from `floor` if there is one."""
    low = min(values) if floor is None else floor
    step = tick_of(max(values) - low)
    return math.floor(low / step) * step, math.ceil(max(values) / step) * step


def tick_of(length: float) -> float:
    """Between ticks: 1, 2 or 5 times a power of ten, about five of them."""
    length = length or 1.0
    unit = 10 ** math.floor(math.log10(length / 5))
    return next(unit * n for n in (1, 2, 5, 10) if length / (unit * n) <= 5)


def axes(panel: Panel, numbered: bool = False) -> list[str]:
    """Grid lines with their values; `numbered`: the steps below too."""
    step = tick_of(panel.high - panel.low)
    parts = []
    for n in range(round((panel.high - panel.low) / step) + 1):
        value = panel.low + n * step
        y = panel.y(value)
        parts.append(line(LEFT, y, WIDTH - RIGHT, y, "#dddddd"))
        parts.append(label(LEFT - 8, y + 4, f"{value:g}", anchor="end"))
    step = tick_of(panel.last)
    for n in range(int(panel.last / step) + 1):
        x = panel.x(n * step)
        parts.append(line(x, panel.bottom, x, panel.bottom + 4, "#888888"))
        if numbered:
            parts.append(label(x, panel.bottom + 18, f"{n * step:,.0f}", anchor="middle"))
    return parts


def curve(panel: Panel, points: Points, color: str) -> str:
    path = " ".join(f"{panel.x(step):.1f},{panel.y(value):.1f}" for step, value in points)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>'


def dot(panel: Panel, point: tuple[float, float], color: str, radius: float = 4) -> str:
    x, y = panel.x(point[0]), panel.y(point[1])
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{color}"/>'


def legend(panel: Panel, entries: list[tuple[str, str]]) -> list[str]:
    """At the right above the curves."""
    return [
        label(WIDTH - RIGHT - 8, panel.top + 16 + 16 * n, text, anchor="end", color=color)
        for n, (text, color) in enumerate(entries)
    ]


def line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>'


def label(
    x: float, y: float, text: str, *, anchor: str = "start", color: str = "#333333", size: int = 12
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} fill="{color}" font-size="{size}">{escape(text)}</text>'
