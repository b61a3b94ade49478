"""Windows of the global data order that a run skips: where the data of a step lie is a pure function of
(step, skipped windows).
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np

from deepseek_jax.data.fields import Rows

Window = tuple[int, int]  # rows first to last - 1 of the global order


class Windows(NamedTuple):
    """Disjoint windows in order. The row that is n-th to be trained on, from 0, is the n-th outside all of
    them.
    """

    skipped: tuple[Window, ...] = ()

    @classmethod
    def of(cls, windows: Iterable[Iterable[int]]) -> "Windows":
        """Of ranges in any order, some of which may touch: as a checkpoint's `extra` and metrics.jsonl have
        them.
        """
        out: list[Window] = []
        for first, last in sorted((int(first), int(last)) for first, last in windows):
            if out and first <= out[-1][1]:
                first, last = out[-1][0], max(out.pop()[1], last)
            out.append((first, last))
        return cls(tuple(out))

    def row(self, n: int) -> int:
        """The n-th row that is trained on, in the global order."""
        for first, last in self.skipped:
            if n < first:
                break
            n += last - first
        return n

    def rows(self, start: int, count: int) -> list[Window]:
        """Rows start to start + count - 1 that are trained on, as ranges of the global order."""
        if not self.skipped:
            return [(start, start + count)]
        out: list[list[int]] = []
        for n in range(start, start + count):
            row = self.row(n)
            if out and out[-1][1] == row:
                out[-1][1] += 1
            else:
                out.append([row, row + 1])
        return [(first, last) for first, last in out]

    def without(self, start: int, count: int) -> "Windows":
        """Skips what would have been rows start to start + count - 1, and all that lies between them."""
        return Windows.of([*self.skipped, (self.row(start), self.row(start + count - 1) + 1)])


class TrainRows(Protocol):
    def train_rows(self, start: int, count: int) -> Rows: ...


class Skipping:
    """`source.train_rows` without the skipped windows."""

    def __init__(self, source: TrainRows, windows: Windows):
        self._source = source
        self._windows = windows

    def train_rows(self, start: int, count: int) -> Rows:
        parts = [
            self._source.train_rows(first, last - first)
            for first, last in self._windows.rows(start, count)
        ]
        return (
            {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
            if len(parts) > 1
            else parts[0]
        )
