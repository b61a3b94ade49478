"""Draws the loss and the expert load of a run, from its metrics.jsonl, as an SVG.

  python -m benchmarks picture WORKDIR/metrics.jsonl OUT.svg [--title=TEXT]

Above: the training loss of every logged step, and the held-out loss of every evaluation. Below:
max_violation, by how much the fullest expert of any layer exceeds the mean load (0 is even).
docs/tiny.svg is drawn so from a run of configs/tiny.py.
"""

import json
import math
import pathlib
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from deepseek_jax.cli import arguments
from deepseek_jax.errors import UserError
from deepseek_jax.plan import options

WIDTH, HEIGHT = 760, 420  # pixels
LEFT, RIGHT, TOP = 56, 20, 40  # margins
BLUE, ORANGE, GREY = "#2166ac", "#d6604d", "#777777"

Points = list[tuple[float, float]]  # (step, value)


class Panel(NamedTuple):
    """One pair of axes: from `top` to `bottom`, values from `low` to `high`, steps from 0 to `last`."""

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


def main() -> int:
    parser = options.Parser(__doc__, json=False)
    parser.add_argument(
        "metrics", type=arguments.path, metavar="FILE", help="metrics.jsonl of a run."
    )
    parser.add_argument("out", type=arguments.path, metavar="OUT", help="The SVG.")
    parser.add_argument("--title", default="", help="Text above.")
    own = parser.parse_args()
    try:
        lines = pathlib.Path(own.metrics).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    except (OSError, json.JSONDecodeError) as e:
        raise UserError(f"{own.metrics}: {e}. Name the metrics.jsonl of a run.") from None
    pathlib.Path(own.out).write_text(drawn(rows, own.title), encoding="utf-8")
    return 0


def drawn(rows: list[dict[str, float]], title: str) -> str:
    """The SVG.

    Args:
      rows: Lines of metrics.jsonl.
      title: Text above the panels.

    Raises:
      UserError: Nothing is logged yet.
    """
    losses = column(rows, "loss")
    held_out = column(rows, "eval_loss")
    violations = column(rows, "max_violation")
    if not losses or not violations:
        raise UserError(
            "The file has no row with loss and max_violation. Let the run log some steps."
        )
    last = max(step for step, _ in losses)
    upper = Panel(TOP, 245, *span([v for _, v in losses + held_out], floor=None), last)
    lower = Panel(285, HEIGHT - 36, *span([v for _, v in violations], floor=0.0), last)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        f' width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        label(LEFT, 20, title, size=14),
        *axes(upper),
        curve(upper, losses, BLUE),
        *(dot(upper, point, ORANGE) for point in held_out),
        *legend(upper, [("training loss, nats per token", BLUE), ("held-out loss", ORANGE)]),
        *axes(lower, numbered=True),
        curve(lower, violations, GREY),
        *legend(lower, [("max violation of the mean expert load", GREY)]),
        label(WIDTH - RIGHT, HEIGHT - 4, "step", anchor="end"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def column(rows: list[dict[str, float]], name: str) -> Points:
    return [(row["step"], row[name]) for row in rows if name in row]


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


def dot(panel: Panel, point: tuple[float, float], color: str) -> str:
    x, y = panel.x(point[0]), panel.y(point[1])
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>'


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
