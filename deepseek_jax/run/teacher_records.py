"""What a teacher says of the tokens of a batch, kept small: read from a cache (config.distill.cache) with the
rows, or asked before each step (config.distill.top_k), by the program that makes a cache.
"""

import functools

import jax

from deepseek_jax.config.options import Config
from deepseek_jax.data.example_loader import ExampleLoader
from deepseek_jax.data.fields import Rows
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.windows import Window
from deepseek_jax.distill import checks
from deepseek_jax.distill.program import RecordProgram
from deepseek_jax.errors import UserError
from deepseek_jax.model.layout import ModelWeights
from deepseek_jax.objectives.base import Batch, Frozen
from deepseek_jax.objectives.distill import scheduled
from deepseek_jax.run.batches import Batches, LoaderBatches
from deepseek_jax.run.progress import Progress
from deepseek_jax.run.teacher import Teacher, open_teacher


class TeacherRecords:
    """The records that a run's batches have; of other runs nothing is added.

    Args:
      config: of the run.
      data: what it reads.
      mesh: of the run.
      progress: show a bar when a teacher's weights are read.

    Attributes:
      teacher: of a distillation without a cache, whether records of it are kept or not.

    Raises:
      UserError: as `open_teacher` and `checks.open_cache`, a cache is of another teacher than the one that is
        named with it, or the teacher has fewer words than config.distill.top_k.
    """

    def __init__(
        self,
        config: Config,
        workdir: str,
        data: Loader | ExampleLoader,
        mesh: jax.sharding.Mesh,
        progress: bool,
    ):
        named = open_teacher(config, workdir, progress)
        self._config = config
        self._mesh = mesh
        self._cached = checks.open_cache(config, data, mesh, named.identity if named else "")
        self._asked: _Asked | None = None
        self.teacher = None if self._cached else named
        if self.teacher is not None and config.distill.top_k:
            self._asked = _Asked(config, self.teacher, mesh)

    def load(self) -> None:
        """Compiles the program and reads the weights of a teacher that is asked."""
        if self._asked is not None:
            self._asked.load()

    def batches(self, source: Loader | ExampleLoader) -> Batches:
        """Those of the run's steps."""
        batches = LoaderBatches(self._config, source, self._mesh, self._cached)
        return batches if self._asked is None else _AskedBatches(batches, self._asked)

    def add_to_rows(self, rows: Rows) -> Rows:
        """Held-out rows with what was cached of them."""
        return rows if self._cached is None else self._cached.add_to(rows)

    def add_to_batch(self, batch: Batch, step: int) -> Batch:
        """A batch of them, [A, B, ...], with what the teacher says when it is asked after `step` steps."""
        return batch if self._asked is None else self._asked.add_to(batch, step)


class _Asked:
    """A teacher that is asked."""

    def __init__(self, config: Config, teacher: Teacher, mesh: jax.sharding.Mesh):
        self._config = config
        self._words = min(teacher.vocab_size, config.model.vocab_size)
        if config.distill.top_k > self._words:
            raise UserError(
                f"config.distill.top_k={config.distill.top_k} is above the {self._words} words of "
                f"config.distill.teacher={config.distill.teacher}. Set it to {self._words} or less."
            )
        placed = teacher.place(mesh)
        self._frozen = Frozen(placed, functools.partial(teacher.load, placed))
        self._mesh = mesh
        self._program: RecordProgram | None = None
        self._weights: ModelWeights | None = None

    def load(self) -> None:
        if self._weights is not None:  # in a stage before
            return
        length, top = self._config.train.sequence_length, self._config.distill.top_k
        self._program = RecordProgram(self._frozen, top, self._words, length, self._mesh)
        self._program.compile()
        self._weights = self._frozen.load()

    def add_to(self, batch: Batch, step: int) -> Batch:
        assert self._program is not None and self._weights is not None  # `load` was called
        at = self._config.distill.temperature
        if "temperature" in self._config.distill.scheduled:
            at = float(scheduled(self._config, "temperature", jax.numpy.int32(step)))
        return batch | self._program.of_batch(self._weights, batch, (1.0, at))


class _AskedBatches:
    """The batches of a run with what a teacher says of them."""

    def __init__(self, batches: Batches, teacher: _Asked):
        self._batches = batches
        self._teacher = teacher

    def begin(self, progress: Progress) -> None:
        self._batches.begin(progress)

    def batch(self, step: int) -> Batch:
        return self._teacher.add_to(self._batches.batch(step), step)

    def rows(self, step: int) -> list[Window]:
        return self._batches.rows(step)

    def close(self) -> None:
        self._batches.close()
