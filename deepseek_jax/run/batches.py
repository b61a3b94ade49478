"""The batches of a run's steps.

The loop asks for the batch of a step, by its number, and so does whoever makes data while the run
goes on: anything with `begin`, `batch`, `rows` and `close` can stand in the loader's place.
"""

from collections.abc import Generator
from typing import Protocol

import jax

from deepseek_jax.config.options import Config
from deepseek_jax.data.fields import Rows
from deepseek_jax.data.prefetch import read_ahead
from deepseek_jax.data.windows import Skipping, TrainRows, Window
from deepseek_jax.distill.reader import CachedTeacher
from deepseek_jax.run.progress import Progress
from deepseek_jax.train.batch import put_batch

Batch = dict[str, jax.Array]


class Batches(Protocol):
    """Where the loop's batches come from. The same in every process."""

    def begin(self, progress: Progress) -> None:
        """What steps read follows `progress` from here on: at the start of a run, and after a rollback."""

    def batch(self, step: int) -> Batch:
        """The batch of the step after `step` finished ones, laid out over the mesh.

        A pure function of `step` and of what `begin` was told.
        """

    def rows(self, step: int) -> list[Window]:
        """The ranges of the data order that it is made of, for messages and logs."""

    def close(self) -> None: ...


class LoaderBatches:
    """Batches of rows that a loader reads in the order of the run, ahead of the steps.

    Args:
      config: of the run; nothing is read for steps beyond its last.
      source: has `train_rows(start, count)`.
      mesh: batches are laid out over it.
      cached: what a teacher has said of the rows, which is read with them; None: there is none.
    """

    def __init__(
        self,
        config: Config,
        source: TrainRows,
        mesh: jax.sharding.Mesh,
        cached: CachedTeacher | None = None,
    ):
        self._config = config
        self._source = source
        self._mesh = mesh
        self._cached = cached
        self._progress = Progress()
        self._next = 0  # the step whose rows come next out of `_ahead`
        self._ahead: Generator[Rows, None, None] | None = None

    def begin(self, progress: Progress) -> None:
        self.close()
        self._progress = progress

    def batch(self, step: int) -> Batch:
        if self._ahead is None or step != self._next:
            self.close()
            self._ahead = self._read_ahead_from(step)
        self._next = step + 1
        return put_batch(next(self._ahead), self._config.micro_batch, self._mesh)

    def rows(self, step: int) -> list[Window]:
        return self._progress.rows(step)

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None

    def _read_ahead_from(self, step: int) -> Generator[Rows, None, None]:
        history = self._progress.history
        source = Skipping(self._source, self._progress.skipped)

        def read(step: int) -> Rows:
            rows = source.train_rows(history.first_row(step), history.count(step))
            return rows if self._cached is None else self._cached.add_to(rows)

        return read_ahead(read, step, self._config.train.steps)
