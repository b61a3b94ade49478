"""A teacher that is asked before each step (config.distill.top_k): its weights lie beside the state all the
time, and its program runs between the steps, while the state stays where it is.
"""

from typing import Any

import jax

from deepseek_jax.config.options import Config
from deepseek_jax.distill.program import RecordProgram
from deepseek_jax.objectives.base import Frozen
from deepseek_jax.parallel import sharding
from deepseek_jax.run import teacher
from deepseek_jax.xla import program


class Asked:
    """Such a teacher, as far as its config.json says what it is.

    Args:
      config: of the run.
      mesh: whose devices may be elsewhere.
      found: the teacher.

    Raises:
      UserError: the mesh does not divide it.
    """

    def __init__(self, config: Config, mesh: jax.sharding.Mesh, found: teacher.Teacher):
        self._config = config
        self._mesh = mesh
        self._placed = found.place(mesh)
        self._words = min(found.vocab_size, config.model.vocab_size)

    @property
    def bytes(self) -> int:
        """Of its weights, on one device."""
        return sharding.bytes_per_device(self._placed.abstract, self._placed.shardings)

    def memory(self) -> program.Memory:
        """Of its program, compiled for the devices of the mesh."""
        frozen = Frozen(self._placed, _no_weights)
        top, length = self._config.distill.top_k, self._config.train.sequence_length
        with jax.set_mesh(self._mesh):
            records = RecordProgram(frozen, top, self._words, length, self._mesh)
            return program.memory(records.compile())


def find(config: Config, mesh: jax.sharding.Mesh) -> Asked | None:
    """The teacher of a run that asks one between its steps."""
    if config.objective != "distill" or not config.distill.top_k:
        return None
    found = teacher.planned(config)
    return None if found is None else Asked(config, mesh, found)


def beside(step: program.Memory, weights: int, asking: program.Memory) -> dict[str, Any]:
    """What both programs need of a device: the step beside the teacher's weights, or the teacher's program
    beside the state.

    Args:
      step: of the train step. weights: bytes of the teacher's. asking: of the teacher's program.
    """
    return {
        "teacher": weights,
        "teacher_temporaries": asking.temporaries,
        "total": max(step.total + weights, step.arguments + asking.total),
    }


def _no_weights() -> Any:
    raise NotImplementedError("a plan reads no weights")
