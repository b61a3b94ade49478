"""A run as a page of the terminal."""

import datetime
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from deepseek_jax.cli.texts import printable
from deepseek_jax.report.run_files import Look
from deepseek_jax.run.metrics import terminal_text

EIGHTHS = " ▁▂▃▄▅▆▇█"
CURVE_LINES = 8
LATE = 60.0  # seconds without a word after which a process is marked
RECENT = 20  # steps' rows that say how fast it is now


def draw(look: Look, width: int, height: int | None) -> RenderableType:
    """The page.

    Args:
      width: of the terminal, in columns.
      height: in lines; None: as many as it takes.
    """
    parts: list[RenderableType] = [_head(look)]
    inside = max(width - 4, 20)
    if look.rows:
        losses = [row["loss"] for row in look.rows]
        title = f"loss, steps {look.rows[0]['step']:,} to {look.rows[-1]['step']:,}"
        parts.append(Panel(_text(curve(losses, inside - 10, CURVE_LINES)), title=title))
    if len(look.counts_LE):
        taken = len(look.processes) + len(look.events[-3:]) + CURVE_LINES + 14
        lines = None if height is None else max(height - taken, 4)
        title = f"tokens by expert, step {look.load_step:,}: 1 is the mean of a layer"
        parts.append(Panel(_experts(look, inside, lines), title=title))
    if look.processes:
        parts.append(Panel(_processes(look), title="processes"))
    return Group(*parts)


def curve(values: Sequence[float], width: int, lines: int) -> list[str]:
    """Values from left to right as columns of blocks, with the range of what is shown at the left; several
    that share a column are averaged, few are as wide as fits, and what is not finite is a gap."""
    kept = np.repeat(np.asarray(values, np.float64), max(width // len(values), 1))
    parts = np.array_split(kept, min(max(width, 1), len(kept)))
    means = [float(np.mean(p[np.isfinite(p)])) if np.isfinite(p).any() else math.nan for p in parts]
    finite = [m for m in means if math.isfinite(m)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    scale = (8 * lines - 1) / (high - low) if high > low else 0.0
    eighths = [1 + round((m - low) * scale) if math.isfinite(m) else 0 for m in means]
    drawn = []
    for line in reversed(range(lines)):
        edge = high if line == lines - 1 else low if line == 0 else None
        label = "" if edge is None else f"{edge:.4g}"
        blocks = "".join(EIGHTHS[min(max(e - 8 * line, 0), 8)] for e in eighths)
        drawn.append(f"{label:>9} {blocks}")
    return drawn


def bars(shares: np.ndarray, width: int) -> str:
    """A layer's experts from left to right: a full block is twice the mean or more, half a block the mean.
    Where there are more experts than columns, a column is the fullest of its own."""
    parts = np.array_split(shares, min(max(width, 1), len(shares)))
    levels = (min(max(round(4 * float(p.max())), 0), 8) for p in parts)
    return "".join(EIGHTHS[level] for level in levels)


def _head(look: Look) -> RenderableType:
    lines = []
    if not look.rows:
        lines.append(f"no step has been logged yet, of {look.steps:,}")
    else:
        row = look.rows[-1]
        recent = [r["step_time_s"] for r in look.rows[-RECENT:] if "step_time_s" in r]
        left = (look.steps - row["step"]) * (sum(recent) / len(recent)) if recent else 0.0
        share = row["step"] / max(look.steps, 1)
        when = f", {_duration(left)} left" if left and row["step"] < look.steps else ""
        stage = f"  stage {row['stage']}: {row['stage_name']}" if "stage_name" in row else ""
        lines.append(f"step {row['step']:,} of {look.steps:,} ({share:.0%}){when}{stage}")
        lines.append(terminal_text(row))
        more = [f"learning rate {row['lr']:.3g}", f"gradient norm {row['grad_norm']:.3g}"]
        if "utilisation" in row:
            more.append(f"utilisation {row['utilisation']:.1%}")
        more.append(f"{row['memory_gb']:.3g} GB" if "memory_gb" in row else "")
        more.append(f"{row['tokens_seen']:,} tokens seen")
        if row.get("skipped_steps"):
            more.append(f"{row['skipped_steps']:,} updates skipped")
        lines.append("  ".join(filter(None, more)))
    if look.evaluations:
        last, best = look.evaluations[-1], min(look.evaluations, key=lambda r: r["eval_loss"])
        lines.append(
            f"held-out loss {last['eval_loss']:.4f} at step {last['step']:,}, "
            f"lowest {best['eval_loss']:.4f} at step {best['step']:,}"
        )
    lines.extend(_event(row) for row in look.events[-3:])
    return Panel(_text(lines), title=printable(look.workdir))


def _event(row: dict[str, Any]) -> str:
    if "rollback" in row:
        return f"rollback {row['rollback']}: from step {row['rolled_back_from']:,} to {row['step'] - 1:,}"
    return f"spike at step {row['step']:,}: {row['spike_loss']:.4f}, {row['deviations']:.0f} deviations"


def _experts(look: Look, width: int, lines: int | None) -> RenderableType:
    """Layers in their order: all, or those with the fullest experts, as many as there are lines."""
    counts_LE = look.counts_LE.astype(np.float64)
    means_L = counts_LE.mean(axis=1)
    shares_LE = counts_LE / np.maximum(means_L, 1e-9)[:, None]
    worst_L = shares_LE.max(axis=1)
    shown = np.arange(len(worst_L))
    if lines is not None and len(shown) > lines:
        shown = np.sort(np.argsort(-worst_L, kind="stable")[:lines])
    table = Table.grid(padding=(0, 1))
    for i in shown:
        name = look.layer_name(int(i))
        idle = int((counts_LE[i] == 0).sum())
        said = f"fullest {worst_L[i]:.2f}" + (f", {idle} idle" if idle else "")
        style = "red" if worst_L[i] >= 3 else "yellow" if worst_L[i] >= 1.5 else "green"
        room = max(width - len(name) - len(said) - 4, 8)
        table.add_row(name, Text(bars(shares_LE[i], room), style=style), said)
    return table


def _processes(look: Look) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for p in look.processes:
        ago = max(look.time - p["time"], 0.0)
        late = p["state"] == "training" and ago > LATE
        row = (
            str(p["process"]),
            printable(p["host"]),
            str(p["pid"]),
            printable(p["state"]),
            f"step {p['step']:,}",
            f"{p['memory_gb']:.3g} GB",
            f"{_duration(ago)} ago" + (": late" if late else ""),
        )
        table.add_row(*(Text(cell, style="red" if late else "") for cell in row))
    return table


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return str(datetime.timedelta(seconds=round(seconds))).removesuffix(":00")


def _text(lines: list[str]) -> Text:
    """As it is: nothing in it is markup, and no character of it steers the terminal."""
    return Text("\n".join(map(printable, lines)), no_wrap=True, overflow="ellipsis")
