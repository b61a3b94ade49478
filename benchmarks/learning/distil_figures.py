"""What the runs of distil_demo.py show: a table, a picture, and whether it is what the config states."""

import re
import statistics
from typing import Any

from benchmarks.learning import picture
from deepseek_jax.cli import texts

COLORS = {
    "cross-entropy": picture.GREY,
    "distilled": picture.BLUE,
    "distilled, router": picture.ORANGE,
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


STATED = re.compile(
    r"teacher ([\d.]+), pruned ([\d.]+), by cross-entropy ([\d.]+), distilled ([\d.]+), with the router "
    r"too ([\d.]+), each within ([\d.]+)\. .*?[Dd]istillation wins by at least ([\d.]+)"
)


def differences(result: dict[str, Any], docstring: str) -> list[str]:
    """What is not as the text states, a line each; lines of the text may be broken anywhere."""
    found = STATED.search(" ".join(docstring.split()))
    assert found, "the text states no losses"
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
    p, last = picture, float(r["steps"])
    curves = r["curves"]
    values = [loss for way in curves.values() for curve in way for _, loss in curve]
    upper = p.Panel(p.TOP, 245, *p.span([r["teacher"], *values], floor=None), last)
    gains = {
        way: [
            [(step, theirs - ours) for (step, ours), (_, theirs) in zip(*pair, strict=True)]
            for pair in zip(curves[way], curves["cross-entropy"], strict=True)
        ]
        for way in curves
        if way != "cross-entropy"
    }
    low, high = p.span([g for way in gains.values() for c in way for _, g in c] + [0.0], floor=None)
    lower = p.Panel(285, p.HEIGHT - 36, low, high, last)
    before, kept = r["experts"]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {p.WIDTH} {p.HEIGHT}"'
        f' width="{p.WIDTH}" height="{p.HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{p.WIDTH}" height="{p.HEIGHT}" fill="white"/>',
        p.label(p.LEFT, 20, f"make distil: {kept} of {before} experts kept, then trained", size=14),
        *p.axes(upper),
        p.line(p.LEFT, upper.y(r["teacher"]), p.WIDTH - p.RIGHT, upper.y(r["teacher"]), "#222222"),
    ]
    for way, several in curves.items():
        parts += [p.curve(upper, [(s, v) for s, v in c], COLORS[way]) for c in several]
    names = [("held-out loss, nats per token", "#333333"), *COLORS.items(), ("teacher", "#222222")]
    parts += [*p.legend(upper, names), *p.axes(lower, numbered=True)]
    for way, lines in gains.items():
        parts += [p.curve(lower, c, COLORS[way]) for c in lines]
    parts += [
        *p.legend(lower, [("less than by cross-entropy on the same text", "#333333")]),
        p.label(p.WIDTH - p.RIGHT, p.HEIGHT - 4, "step", anchor="end"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"
