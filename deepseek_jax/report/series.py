"""Rows of metrics.jsonl as points, and fewer of them that keep every extreme.

N: points of one series.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.report.run_files import Row

_PER_BUCKET = 3  # the lowest, the highest, the first that is not finite


class Rows(NamedTuple):
    """The rows of a run by kind, each in the order of steps.

    Attributes:
      went_back: (step, the step that was reached before) where the file has steps twice. Runs drop
        the rows that they make again; a copy or an earlier version may have kept them.
    """

    steps: list[Row]
    evaluations: list[Row]
    spikes: list[Row]
    rollbacks: list[Row]
    went_back: list[tuple[int, int]]


def by_kind(rows: Sequence[Row]) -> Rows:
    """Sorts rows out. Where steps go back, the rows that follow replace those before, as in a run that goes
    on; rows without a step are left out."""
    out = Rows([], [], [], [], [])
    for row in rows:
        step = row.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            continue
        kind = _kind(row, out)
        if kind is out.steps and kind and step <= kind[-1]["step"]:
            out.went_back.append((step, kind[-1]["step"]))
            for kept in out[:4]:
                kept[:] = [r for r in kept if r["step"] < step]
        kind.append(row)
    return out


def _kind(row: Row, rows: Rows) -> list[Row]:
    if "lr" in row:
        return rows.steps
    if "rollback" in row:
        return rows.rollbacks
    if "spike_loss" in row:
        return rows.spikes
    return rows.evaluations if any(name.startswith("eval_") for name in row) else rows.steps


def number(value: Any) -> float:
    """A value of a row; NaN for what is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    return float(value)


def points(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    """-> (steps int64 [N], values float64 [N]) of a metric, NaN where a row lacks it or has no finite number;
    N = 0 where no row has one."""
    found = [row.get(name) for row in rows]
    kinds = set(map(type, found))
    if not kinds & {int, float}:
        return np.zeros(0, np.int64), np.zeros(0)
    if not kinds <= {int, float, type(None)}:
        found = [number(value) for value in found]
    values_N = np.array(found, np.float64)  # NaN for None
    values_N[~np.isfinite(values_N)] = math.nan
    if not np.isfinite(values_N).any():
        return np.zeros(0, np.int64), np.zeros(0)
    return np.array([row["step"] for row in rows], np.int64), values_N


def thinned(values_N: np.ndarray, most: int) -> np.ndarray:
    """The indices of at most `most` points (8 or more): the first and the last, and of equal parts between
    them the lowest, the highest, and one that is not finite where there is one. All where they are no more.
    """
    count = len(values_N)
    if count <= most:
        return np.arange(count)
    kept = {0, count - 1}
    for part in np.array_split(np.arange(1, count - 1), (most - 2) // _PER_BUCKET):
        values = values_N[part]
        finite = part[np.isfinite(values)]
        if len(finite) < len(part):
            kept.add(int(part[~np.isfinite(values)][0]))
        if len(finite):
            kept.add(int(finite[np.argmin(values_N[finite])]))
            kept.add(int(finite[np.argmax(values_N[finite])]))
    return np.array(sorted(kept))


def as_json(value: float) -> float | int | None:
    """A number as short as JSON has it; None for NaN."""
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) and abs(value) < 2**53 else float(value)


class Packed:
    """The series of a run as JSON: steps as differences, each list of steps once.

    Args:
      most: points of a series.

    Attributes:
      steps: lists of differences of steps; the first number is a step.
      series: {name: [index of its steps, values]}.
    """

    def __init__(self, most: int):
        self._most = most
        self._known: dict[bytes, int] = {}
        self.steps: list[list[int]] = []
        self.series: dict[str, list[Any]] = {}

    def add(self, name: str, steps_N: np.ndarray, values_N: np.ndarray) -> None:
        """Nothing where N is 0."""
        if not len(steps_N):
            return
        kept = thinned(values_N, self._most)
        steps, values = steps_N[kept], values_N[kept]
        key = steps.tobytes()
        if key not in self._known:
            self._known[key] = len(self.steps)
            self.steps.append([int(steps[0]), *np.diff(steps).tolist()])
        self.series[name] = [self._known[key], [as_json(v) for v in values.tolist()]]
