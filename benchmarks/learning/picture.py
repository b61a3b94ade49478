"""Draws the loss and the expert load of a run, from its metrics.jsonl, as an SVG.

  python -m benchmarks picture WORKDIR/metrics.jsonl OUT.svg [--title=TEXT]

Above: the training loss of every logged step, and the held-out loss of every evaluation. Below:
max_violation, by how much the fullest expert of any layer exceeds the mean load (0 is even).
docs/tiny.svg is drawn so from a run of configs/tiny.py.
"""

import json
import pathlib

from deepseek_jax.cli import arguments
from deepseek_jax.cli.svg import (
    BLUE,
    GREY,
    ORANGE,
    RIGHT,
    WIDTH,
    Panel,
    Points,
    axes,
    curve,
    dot,
    label,
    legend,
    picture,
    span,
)
from deepseek_jax.errors import UserError
from deepseek_jax.plan import options

HEIGHT, TOP = 420, 40  # pixels, of the whole and above the panels


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
        *axes(upper),
        curve(upper, losses, BLUE),
        *(dot(upper, point, ORANGE) for point in held_out),
        *legend(upper, [("training loss, nats per token", BLUE), ("held-out loss", ORANGE)]),
        *axes(lower, numbered=True),
        curve(lower, violations, GREY),
        *legend(lower, [("max violation of the mean expert load", GREY)]),
        label(WIDTH - RIGHT, HEIGHT - 4, "step", anchor="end"),
    ]
    return picture(HEIGHT, title, parts)


def column(rows: list[dict[str, float]], name: str) -> Points:
    return [(row["step"], row[name]) for row in rows if name in row]
