"""What happened to a run besides training: starts, spikes, skipped updates, rollbacks, stages, with the data
that they concern."""

import contextlib
from typing import Any, NamedTuple

from deepseek_jax.cli.texts import plural
from deepseek_jax.errors import UserError
from deepseek_jax.report.series import Rows
from deepseek_jax.train import starts
from deepseek_jax.train.history import History
from deepseek_jax.train.workdir import read_history

KINDS = {  # kind -> (heading, what a mark of it means)
    "start": ("start", "the run was started, or went on"),
    "spike": ("spike", "a loss far above those before it"),
    "skipped": ("skipped", "an update was skipped: loss or gradient were not finite"),
    "rollback": ("rollback", "back to a checkpoint, and on with other data"),
    "stage": ("stage", "another stage begins"),
    "checkpoint": ("checkpoint", "the state was saved"),
}


class Event(NamedTuple):
    """Attributes:
    kind: of KINDS.
    step: where it is marked.
    text: in a sentence.
    sequences: ranges [first, last + 1) of the data order.
    """

    kind: str
    step: int
    text: str
    sequences: list[tuple[int, int]]


def events(workdir: str, rows: Rows) -> list[Event]:
    """All of a run, in the order of steps."""
    history = None
    with contextlib.suppress(UserError):
        history = read_history(workdir)[0]
    found = [
        *_starts(starts.read(workdir), rows, history),
        *_spikes(rows),
        *_skipped(rows),
        *_rollbacks(rows),
        *_stages(rows),
    ]
    return sorted(found, key=lambda e: e.step)


def seen(history: History, first: int, last: int) -> list[tuple[int, int]]:
    """The range of the data order that steps `first` + 1 to `last` read, what rollbacks left out not counted;
    [] where they read none, or several orders."""
    if last <= first or history.order(first)[0] != history.order(last - 1)[0]:
        return []
    return [(history.first_row(first), history.first_row(last - 1) + history.count(last - 1))]


def _starts(records: list[dict[str, Any]], rows: Rows, history: History | None) -> list[Event]:
    if not records:
        return [
            Event("start", step - 1, f"goes on after step {step - 1:,}; {before:,} was reached", [])
            for step, before in rows.went_back
        ]
    out = []
    for r in records:
        step, reached = r["step"], _whole(r.get("reached"))
        of_devices = starts.processes(r)
        text = "the run begins" if not step else f"goes on after step {step:,}"
        if of_devices:
            processes = len(set(of_devices))
            hosts = f" of {processes} processes" if processes > 1 else ""
            text += f" on {plural(len(of_devices), 'device')}{hosts}"
        if step and "sequence" in r:
            text += f", with sequence {_whole(r['sequence']):,}"
        if reached > step:
            text += f"; {reached:,} was reached before: {plural(reached - step, 'step')} made again"
        if stage := r.get("stage"):
            text += f"; stage {stage}"
        changed = r.get("changed")
        if isinstance(changed, list) and changed:
            text += "; changed: " + ", ".join(map(str, changed))
        again = seen(history, step, reached) if history and reached > step else []
        out.append(Event("start", step, text, again))
    return out


def _spikes(rows: Rows) -> list[Event]:
    return [
        Event(
            "spike",
            r["step"],
            f"loss {r['spike_loss']}, {r.get('deviations')} deviations above the median "
            f"{r.get('median_loss')} of those before",
            _ranges(r.get("rows")),
        )
        for r in rows.spikes
    ]


def _skipped(rows: Rows) -> list[Event]:
    """Of updates in a row one event, of what each of their rows says."""
    out: list[Event] = []
    counted = 0
    last = -1
    for i, r in enumerate(rows.steps):
        more = _whole(r.get("skipped_steps")) - counted
        counted = max(counted + more, 0)
        if more <= 0:
            continue
        ranges = _ranges(r.get("rows"))
        if out and last == i - 1 and r["step"] == rows.steps[i - 1]["step"] + 1:
            before = out.pop()
            ranges = before.sequences + ranges
            first = before.step
        else:
            first = r["step"] - more + 1
        steps = f"step {first:,}" if first == r["step"] else f"steps {first:,} to {r['step']:,}"
        out.append(Event("skipped", first, f"no update in {steps}: not finite", ranges))
        last = i
    return out


def _rollbacks(rows: Rows) -> list[Event]:
    out, known = [], 0
    for r in rows.rollbacks:
        ranges = _ranges(r.get("skipped_rows"))
        text = (
            f"rollback {r['rollback']}: from step {r.get('rolled_back_from')} back to "
            f"{r['step'] - 1:,}; the data since are left out"
        )
        out.append(Event("rollback", r["step"], text, ranges[known:] or ranges))
        known = len(ranges)
    return out


def _stages(rows: Rows) -> list[Event]:
    out, before = [], None
    for r in rows.steps:
        if (name := r.get("stage_name")) is not None and name != before:
            out.append(Event("stage", r["step"], f"stage {r.get('stage')}: {name}", []))
            before = name
    return out


def _ranges(value: Any) -> list[tuple[int, int]]:
    if not isinstance(value, list):
        return []
    return [(_whole(r[0]), _whole(r[1])) for r in value if isinstance(r, list) and len(r) == 2]


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
