"""The parts of a page that are text and tables: they need no script."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from deepseek_jax.cli.texts import gb, human, plural
from deepseek_jax.config.options import OPTIONS, Config
from deepseek_jax.report.events import KINDS
from deepseek_jax.report.markup import Child, Markup, joined, table, tag
from deepseek_jax.report.run_data import RunData
from deepseek_jax.report.run_files import Row
from deepseek_jax.report.series import as_json, number, points
from deepseek_jax.train import starts

EVENTS = 200  # rows of the table at most; marks of all are in the charts
_RANGES = 6  # of sequences, in a cell
_LONG = 400  # characters of an option's value that are shown: some hold a whole template


def summary(run: RunData) -> Markup:
    """The figures that one looks for first, as the last rows have them."""
    steps, evaluations = run.rows.steps, run.rows.evaluations
    last = steps[-1] if steps else {}
    tiles: list[tuple[str, Child, str]] = [("step", _exact(last.get("step", 0)), _state(run))]
    if "loss" in last:
        tiles.append(("training loss", _exact(last["loss"]), "nats per token"))
    held = [r for r in evaluations if number(r.get("eval_loss")) == number(r.get("eval_loss"))]
    if held:
        best = min(held, key=lambda r: number(r["eval_loss"]))
        lowest = f"lowest {best['eval_loss']:.4f} at step {best['step']:,}"
        tiles.append(("held-out loss", _exact(held[-1]["eval_loss"]), f"nats per token; {lowest}"))
        if "eval_bits_per_byte" in held[-1]:
            tiles.append(("held-out", _exact(held[-1]["eval_bits_per_byte"]), "bits per byte"))
    if "tokens_seen" in last:
        tiles.append(("tokens seen", _exact(last["tokens_seen"]), "padding left out"))
    speed, seconds, share = (_median(steps, name) for name in _MEDIANS)
    if speed is not None:
        note = "tokens/s, median" + (f"; {seconds:.3g} s per step" if seconds else "")
        tiles.append(("throughput", human(speed), note))
    if share is not None:
        tiles.append(("share of peak", f"{share:.1%}", "median"))
    if "memory_gb" in last:
        tiles.append(("peak memory", _exact(last["memory_gb"]), "GB, of the fullest device"))
    if run.load is not None and "max_violation" in last:
        tiles.append(("max violation", _exact(last["max_violation"]), "fullest expert / mean - 1"))
    skipped = last.get("skipped_steps")
    if skipped:
        tiles.append(("skipped updates", _exact(skipped), "not finite"))
    if "parameters" in run.start:
        active = f"{human(number(run.start.get('active')))} active per token"
        tiles.append(("parameters", human(number(run.start["parameters"])), active))
    return tag(
        "dl",
        [
            tag("div", tag("dt", name), tag("dd", value), tag("dd", note, class_="note"))
            for name, value, note in tiles
        ],
        class_="tiles",
    )


_MEDIANS = ("tokens_per_sec", "step_time_s", "utilisation")


def _median(steps: Sequence[Row], name: str) -> float | None:
    values = points(steps, name)[1]
    return float(np.nanmedian(values)) if len(values) else None


def _exact(value: Any) -> Markup:
    """A number for people, and for programs as metrics.jsonl has it."""
    as_text = f"{value:,}" if isinstance(value, int) else f"{number(value):.6g}"
    return tag("data", as_text, value=json.dumps(value), title=f"{value}")


def about(run: RunData) -> Markup:
    """What was trained, on what and with what."""
    s, versions = run.start, run.start.get("versions")
    parts = [str(s.get("data", ""))]
    if devices := len(starts.processes(s)):
        parts.append(f"{plural(devices, 'device')} ({s.get('device_kind')})")
    if isinstance(versions, dict):
        parts.append(", ".join(f"{name} {v}" for name, v in versions.items()))
    text = " \u00b7 ".join([run.look.workdir, *filter(None, parts)])
    return tag("p", text, class_="about")


def _state(run: RunData) -> str:
    last = run.rows.steps[-1]["step"] if run.rows.steps else 0
    of = f"of {run.look.steps:,}"
    if not run.rows.steps:
        return f"{of}: no step has been logged yet"
    if last >= run.look.steps:
        return f"{of}: finished"
    # Process 0 says that it ended before it writes this page, others around that time.
    training = any(p["state"] == "training" for p in run.look.processes[:1])
    return f"{of}: {'was training when this page was written' if training else 'stopped'}"


def events(run: RunData) -> Markup:
    """What happened, as a table; "" where only the first start did."""
    found = run.events
    if not [e for e in found if e.kind != "start" or e.step]:
        return Markup("")
    shown = found[:EVENTS]
    rows: list[list[Child]] = [
        [f"{e.step:,}", KINDS[e.kind][0], e.text, _sequences(e.sequences)] for e in shown
    ]
    left = len(found) - len(shown)
    return joined(
        table(("step", "what", "", "sequences of the data"), rows, "Events"),
        tag("p", f"{left:,} more are not in this table.") if left else None,
    )


def _sequences(ranges: Sequence[tuple[int, int]]) -> str:
    texts = [f"{a:,} to {b - 1:,}" for a, b in ranges[:_RANGES]]
    if len(ranges) > _RANGES:
        texts.append(f"and {len(ranges) - _RANGES} more")
    return ", ".join(texts)


def checkpoints(run: RunData) -> Markup:
    """Those that are there, by names and sizes of their files."""
    if run.checkpoints is None:
        return tag("p", f"In {run.where}, which this page does not look into.")
    if not run.checkpoints:
        return Markup("")
    rows: list[list[Child]] = []
    for c in run.checkpoints:
        loss = c["eval_loss"]
        rows.append(
            [
                c["name"],
                c["kind"],
                gb(c["bytes"]),
                f"{c['files']:,}",
                c["mesh"],
                f"{loss:.4f}" if isinstance(loss, float) else "",
                c["time"],
                joined(c["state"], [f": {c['problems'][0]}"] if c["problems"] else None),
            ]
        )
    heads = ("step", "kind", "bytes", "files", "mesh", "held-out loss", "saved", "check")
    return table(heads, rows, "Checkpoints: names and sizes compared with their manifest")


def experts(run: RunData) -> Markup:
    """The table beside the map of layers."""
    if run.load is None:
        return Markup("")
    rows = [
        [
            load.name,
            f"{load.last:.3f}",
            f"{load.mean:.3f}",
            f"{load.worst:.3f}",
            f"{load.worst_step:,}",
            f"{load.idle}",
            f"{load.entropy:.4f}",
        ]
        for load in run.load.table
    ]
    heads = ("layer", "last", "mean", "highest", "at step", "idle experts", "entropy")
    return table(heads, rows, "The fullest expert of each layer / the mean of the layer")


def answers(run: RunData) -> Markup:
    """What the model answered at each evaluation, and wrote at its end, the newest first."""
    parts = [
        tag("dl", tag("dt", f"step {step:,}"), tag("dd", tag("pre", text)), class_="answer")
        for step, text in reversed(run.samples)
    ]
    for i, (step, rows) in enumerate(reversed(run.answers)):
        texts = [
            tag(
                "dl",
                [
                    (tag("dt", name), tag("dd", tag("pre", row[name])))
                    for name in ("prompt", "answer", "reference")
                    if row[name]
                ],
                class_="answer",
            )
            for row in rows
        ]
        parts.append(
            tag("details", tag("summary", f"step {step:,}"), texts, open=True if not i else None)
        )
    return joined(parts)


def flat(config: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """{"train.steps": 100}"""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            out |= flat(value, f"{where}{key}.")
        else:
            out[f"{where}{key}"] = value
    return out


def options(run: RunData) -> Markup:
    """Those that are not at their default, and all by section."""
    values, base = flat(run.look.config), flat(Config().to_json())
    changed = {n: v for n, v in values.items() if n not in base or base[n] != v}
    rows = [
        [n, _value(v), _value(base[n]) if n in base else "", *_known(n)] for n, v in changed.items()
    ]
    sections: dict[str, list[list[Child]]] = {}
    for name, value in values.items():
        of = name.partition(".")[0] if "." in name else "of the run"
        note = "changed" if name in changed else ""
        sections.setdefault(of, []).append([name, _value(value), note, *_known(name)])
    title = f"{len(changed)} of {len(values)} options are not at their default"
    every = [
        tag("details", tag("summary", f"{of}: {len(own)} options"), table(_HEADS_OF_ALL, own, of))
        for of, own in sections.items()
    ]
    first = table(("option", "value", "by default", "unit", "what it is"), rows, title)
    return tag(
        "div",
        tag("div", first, class_="changed"),
        tag("details", tag("summary", "All options"), every),
        class_="options",
    )


_HEADS_OF_ALL = ("option", "value", "", "unit", "what it is")


def _known(name: str) -> tuple[str, str]:
    """(unit, help) of an option; of one that this version does not know nothing."""
    option = OPTIONS.get(name)
    return (option.unit, option.help) if option else ("", "")


def compared(runs: Sequence[RunData]) -> Markup:
    """The last figures of several runs, and their options that are not the same in all."""
    figures: list[list[Child]] = []
    for name, evaluated, best in _COMPARED:
        cells: list[Child] = []
        for run in runs:
            values = points(run.rows.evaluations if evaluated else run.rows.steps, name)[1]
            values = values[np.isfinite(values)]
            value = best(values) if len(values) else None
            cells.append("\u2013" if value is None else _exact(as_json(float(value))))
        if any(c != "\u2013" for c in cells):
            how = _HOW.get(best, "")
            figures.append([f"{name}{how}", *cells])
    return joined(
        table(("", *(run.name for run in runs)), figures, "Figures") if figures else None,
        _differences(runs),
    )


def _last(values: np.ndarray) -> float:
    return values[-1]


# (metric, whether evaluations have it, how one number stands for a run)
_COMPARED: tuple[tuple[str, bool, Callable[[np.ndarray], Any]], ...] = (
    ("step", False, _last),
    ("tokens_seen", False, _last),
    ("loss", False, _last),
    ("eval_loss", True, _last),
    ("eval_loss", True, np.min),
    ("tokens_per_sec", False, np.median),
    ("utilisation", False, np.median),
    ("memory_gb", False, np.max),
    ("max_violation", False, _last),
)
_HOW = {np.min: ", lowest", np.median: ", median", np.max: ", highest", _last: ", last"}


def _differences(runs: Sequence[RunData]) -> Markup:
    every = [flat(run.look.config) for run in runs]
    names = list(dict.fromkeys(name for values in every for name in values))
    rows: list[list[Child]] = [
        [name, *(_value(v[name]) if name in v else "\u2013" for v in every)]
        for name in names
        if len({_value(v.get(name)) for v in every}) > 1
    ]
    if not rows:
        return tag("p", "The runs have the same options.")
    return table(("option", *(run.name for run in runs)), rows, "Options that differ")


def _value(value: Any) -> str:
    text = '""' if value == "" else str(value)
    return text if len(text) <= _LONG else f"{text[:_LONG]} ... ({len(text):,} characters)"
