"""The loss of a run with FP8 experts beside the same run without, from the same weights on the same data.

  python -m benchmarks fp8 [--config=configs/tiny.py] [--workdir=runs/fp8] [--window=50] [--json]
                           [--config.KEY=...]

Trains the config (`make prove`'s by default) with config.train.fp8=none and row; the same command again goes
on where it was stopped. Losses are compared as means over windows of steps, since single steps of two runs
whose rounding differs are apart by noise, and held-out at the end. Says what the experts' products are
computed in and how long a step takes, which on a device without FP8 is no measure of FP8.

Exit code 1 if a window, the first excepted, or the held-out loss is more than 0.25% apart.
"""

import functools
import json
import pathlib
import statistics
import sys
from typing import Any

from benchmarks.learning.stages import CommandFailed, Stages, metrics
from benchmarks.support.report import Parser, report
from deepseek_jax.cli import arguments, texts
from deepseek_jax.plan import options

BAR = 0.0025  # of a loss
RUNS = ("none", "row")
CONFIG = "configs/tiny.py"


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--workdir", type=arguments.path, default="runs/fp8", help="Folder of both runs."
    )
    parser.add_argument("--window", type=int, default=50, help="Steps whose losses are averaged.")
    own, config = options.read(parser, sys.argv[1:], CONFIG)
    given = [word for word in sys.argv[1:] if word.startswith("--config")]
    if not any(word.startswith("--config=") for word in given):
        given.insert(0, f"--config={CONFIG}")
    folder = pathlib.Path(own.workdir)
    runs = Stages(folder, {"options": " ".join(given)})
    runs.begin()
    try:
        for fp8 in RUNS:
            where = str(folder / fp8)
            more = [f"--workdir={where}", f"--config.train.fp8={fp8}", "--config.log.every_steps=1"]
            runs.stage(fp8, functools.partial(runs.command, "train.py", *given, *more))
    except CommandFailed as failed:
        print(f"fp8: {failed}", file=sys.stderr)
        return failed.ended_with
    result = compared([metrics(folder / fp8) for fp8 in RUNS], own.window)
    result |= {"dtype": config.train.dtype, "options": json.loads(json.dumps(given))}
    report(own, result, text)
    return 0 if result["worst_window"] <= BAR and abs(result["held_out"]["apart"]) <= BAR else 1


def compared(both: list[list[dict[str, Any]]], window: int) -> dict[str, Any]:
    """Two runs' rows of metrics, side by side."""
    losses = [[r["lm_loss"] for r in rows if "lm_loss" in r] for rows in both]
    steps = min(map(len, losses))
    windows = []
    for first in range(0, steps, window):
        exact, ours = (statistics.mean(a[first : first + window]) for a in losses)
        windows.append({"to_step": first + window, "none": exact, "row": ours} | apart(exact, ours))
    held_out = [[r["eval_loss"] for r in rows if "eval_loss" in r][-1] for rows in both]
    seconds = [
        statistics.median(r["step_time_s"] for r in rows if "step_time_s" in r) for rows in both
    ]
    return {
        "windows": windows,
        "worst_window": max(abs(w["apart"]) for w in windows[1:]),
        "held_out": dict(zip(RUNS, held_out, strict=True)) | apart(*held_out),
        "step_seconds": dict(zip(RUNS, seconds, strict=True)),
    }


def apart(exact: float, ours: float) -> dict[str, float]:
    """The relative difference."""
    return {"apart": (ours - exact) / exact}


def sentence(r: dict[str, Any]) -> str:
    """Of docs/speed.md."""
    found = [w["apart"] for w in r["windows"][1:]]
    return (
        f"`tiny` trained whole with experts in FP8 beside without: losses of 50 steps {min(found):+.2%} to "
        f"{max(found):+.2%} apart, held out {r['held_out']['apart']:+.2%}; bar {BAR:.2%}"
    )


def text(result: dict[str, Any]) -> str:
    """The tables for a person."""
    rows = [["to step", *RUNS, "apart"]]
    for w in result["windows"]:
        rows.append([str(w["to_step"]), *(f"{w[name]:.4f}" for name in RUNS), f"{w['apart']:+.2%}"])
    h, s = result["held_out"], result["step_seconds"]
    rows.append(["held out", *(f"{h[name]:.4f}" for name in RUNS), f"{h['apart']:+.2%}"])
    rows.append(["s a step", *(f"{s[name]:.3f}" for name in RUNS), ""])
    return "\n".join(
        [
            texts.table(rows),
            f"worst window {result['worst_window']:.2%}, bar {BAR:.2%}; {result['dtype']} elsewhere",
        ]
    )
