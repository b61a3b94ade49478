"""What the runs of distil_demo.py show: a table, a picture, and whether it is what the config states."""

import re
import statistics
from typing import Any

from deepseek_jax.cli import svg, texts

HEIGHT, TOP, BLACK = 420, 40, "#333333"
COLORS = {
    "cross-entropy": svg.GREY,
    "distilled": svg.BLUE,
    "distilled, router": svg.ORANGE,
}


def summary(
    curves: list[list[list[float]]], by_cross_entropy: list[list[list[float]]]
) -> dict[str, Any]:
    """The last held-out losses of a way, and what it gains on cross-entropy on the same text."""
    losses = [curve[-1][1] for curve in curves]
    gains = [c[-1][1] - ours for ours, c in zip(losses, by_cross_entropy, strict=True)]
    return {
        "losses": losses,
        "loss": statistics.mean(losses),
        "gain": statistics.mean(gains),
        "gain_deviation": statistics.stdev(gains) if len(gains) > 1 else 0.0,
    }


TOLERANCE = 0.05  # nats: other seeds, and Pythons whose sources are a little different
_NUMBER = r"(\d+\.\d+)"
STATED = re.compile(
    f"teacher {_NUMBER}, pruned {_NUMBER}, by cross-entropy {_NUMBER}, distilled {_NUMBER}, with the router "
    f"too {_NUMBER}, each within {_NUMBER}. .*?[Dd]istillation wins by at least {_NUMBER}"
)


def sentence(result: dict[str, Any]) -> str:
    """What a text may state of a run, for `differences` to read: half of what was won is asked for."""
    ways = result["ways"]
    losses = [result["teacher"], result["pruned"], *(s["loss"] for s in ways.values())]
    teacher, pruned, plain, distilled, router = (f"{loss:.3f}" for loss in losses)
    least = min(s["gain"] for way, s in ways.items() if way != "cross-entropy") / 2
    return (
        f"teacher {teacher}, pruned {pruned}, by cross-entropy {plain}, distilled {distilled}, with the "
        f"router too {router}, each within {TOLERANCE}. Distillation wins by at least {least:.3f}."
    )


def differences(result: dict[str, Any], docstring: str) -> list[str]:
    """What is not as the text states, a line each; lines of the text may be broken anywhere."""
    found = STATED.search(" ".join(docstring.split()))
    if not found:
        return [f"no losses are stated. Of this run: {sentence(result)}"]
    *stated, tolerance, least = (float(n) for n in found.groups())
    losses = {name: result[name] for name in ("teacher", "pruned")}
    losses |= {way: s["loss"] for way, s in result["ways"].items()}
    wrong = [
        f"{name}: held-out loss {loss:.4f}, stated {want} within {tolerance}"
        for want, (name, loss) in zip(stated, losses.items(), strict=True)
        if abs(loss - want) > tolerance
    ]
    for way in ("distilled", "distilled, router"):
        if (gain := result["ways"][way]["gain"]) < least:
            wrong.append(f"{way}: wins by {gain:.4f}, stated at least {least}")
    return wrong


def rows_of(r: dict[str, Any]) -> list[list[str]]:
    """The table: a heading, then teacher, pruned and each way."""
    rows = [["", "held-out loss", "beyond the teacher", "wins by"]]
    rows.append(["teacher", f"{r['teacher']:.4f}", "", ""])
    rows.append(["pruned", f"{r['pruned']:.4f}", f"{r['pruned'] - r['teacher']:+.4f}", ""])
    for way, s in r["ways"].items():
        gain = f"{s['gain']:+.4f} ± {s['gain_deviation']:.4f}" if way in r["ways"] else ""
        if way == "cross-entropy":
            gain = ""
        rows.append([way, f"{s['loss']:.4f}", f"{s['loss'] - r['teacher']:+.4f}", gain])
    return rows


def text(r: dict[str, Any]) -> str:
    before, kept = r["experts"]
    return "\n".join(
        [
            f"{kept} of {before} experts kept; {r['steps']} steps of {r['tokens']:,} tokens after it, "
            f"mean of {texts.plural(len(r['seeds']), 'seed')}, nats per token",
            texts.table(rows_of(r), "  "),
            f"{r['minutes']:.0f} minutes in all",
        ]
    )


def drawn(r: dict[str, Any]) -> str:
    """The SVG: above, held-out loss by step, a curve for each seed; below, by how much less it is than
    that of cross-entropy on the same text."""
    last, curves = float(r["steps"]), r["curves"]
    values = [loss for way in curves.values() for curve in way for _, loss in curve]
    upper = svg.Panel(TOP, 245, *svg.span([r["teacher"], *values], floor=None), last)
    gains = {
        way: [
            [(step, theirs - ours) for (step, ours), (_, theirs) in zip(*pair, strict=True)]
            for pair in zip(curves[way], curves["cross-entropy"], strict=True)
        ]
        for way in curves
        if way != "cross-entropy"
    }
    found = [gain for way in gains.values() for curve in way for _, gain in curve]
    lower = svg.Panel(285, HEIGHT - 36, *svg.span([0.0, *found], floor=None), last)
    right, teacher = svg.WIDTH - svg.RIGHT, upper.y(r["teacher"])
    parts = [*svg.axes(upper), svg.line(svg.LEFT, teacher, right, teacher, BLACK)]
    for way, several in curves.items():
        parts += [svg.curve(upper, [(s, v) for s, v in c], COLORS[way]) for c in several]
    names = [("held-out loss, nats per token", BLACK), *COLORS.items(), ("line: teacher", BLACK)]
    parts += [*svg.legend(upper, names), *svg.axes(lower, numbered=True)]
    for way, lines in gains.items():
        parts += [svg.curve(lower, c, COLORS[way]) for c in lines]
    below = [("by how much less than by cross-entropy on the same text", BLACK)]
    parts += [*svg.legend(lower, below), svg.label(right, HEIGHT - 4, "step", anchor="end")]
    before, kept = r["experts"]
    title = f"make distil: {kept} of {before} experts kept, then trained"
    return svg.picture(HEIGHT, title, parts)
