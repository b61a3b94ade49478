"""What an online teacher says of the tokens of a batch, kept small (config.distill.top_k): made before the
step, by the program that makes a cached teacher.
"""

import functools

import jax

from deepseek_jax.config.options import Config
from deepseek_jax.data.windows import Window
from deepseek_jax.distill.program import RecordProgram
from deepseek_jax.errors import UserError
from deepseek_jax.model.layout import ModelWeights
from deepseek_jax.objectives.base import Batch, Frozen
from deepseek_jax.objectives.distill import scheduled
from deepseek_jax.run.batches import Batches
from deepseek_jax.run.progress import Progress
from deepseek_jax.run.teacher import Teacher


class AskedTeacher:
    """An online teacher of which records are kept.

    Args:
      config: of the run.
      mesh: of the run, in force whenever this is used.

    Attributes:
      frozen: its shapes, and what loads it.

    Raises:
      UserError: the mesh does not divide it, or it has fewer words than config.distill.top_k.
    """

    def __init__(self, config: Config, teacher: Teacher, mesh: jax.sharding.Mesh):
        placed = teacher.place(mesh)
        self.frozen = Frozen(placed, functools.partial(teacher.load, placed))
        words = min(teacher.vocab_size, config.model.vocab_size)
        top = config.distill.top_k
        if top > words:
            raise UserError(
                f"config.distill.top_k={top} is above the {words} words of config.distill.teacher="
                f"{config.distill.teacher}. Set it to {words} or less."
            )
        self._config = config
        length = config.train.sequence_length
        self._program = RecordProgram(self.frozen, top, words, length, mesh)
        self._weights: ModelWeights | None = None

    def load(self) -> None:
        """Reads its weights and compiles the program."""
        self._program.compile()
        self._weights = self.frozen.load()

    def add_to(self, batch: Batch, step: int) -> Batch:
        """A batch [A, B, ...] with what the teacher says, for the step after `step` finished ones."""
        assert self._weights is not None  # `load` was called
        at = self._config.distill.temperature
        if "temperature" in self._config.distill.scheduled:
            at = float(scheduled(self._config, "temperature", jax.numpy.int32(step)))
        return batch | self._program.of_batch(self._weights, batch, (1.0, at))


class AskedBatches:
    """The batches of a run with what an online teacher says of them."""

    def __init__(self, batches: Batches, teacher: AskedTeacher):
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
