"""The program that makes records, compiled once and called for a few rows at a time.

A record must not depend on the rows beside it: training reads rows in another order than the cache was made
in. So each device of the batch axes has one row in a call: nothing that a row's tokens go through, neither
their places among the rows of an expert nor the order of any sum, then follows from other rows.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from deepseek_jax.data.fields import INPUTS, Rows
from deepseek_jax.model.layout import ModelWeights
from deepseek_jax.objectives.base import Batch, Frozen
from deepseek_jax.objectives.teacher_record import teacher_record
from deepseek_jax.parallel.mesh import BATCH_AXES, TOKENS, per_device
from deepseek_jax.parallel.sharding import reshard
from deepseek_jax.train.batch import put_batch

STEP = P(None, BATCH_AXES)  # of an array [A, B, ...]


def devices_of_batch(mesh: jax.sharding.Mesh) -> int:
    """Over how many devices the sequences of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


class RecordProgram:
    """A teacher's records of rows. `jax.set_mesh` must be in force.

    Args:
      frozen: the teacher.
      top: words of a record. words: of the vocabulary, without padding.
      length: tokens of a row.
      mesh: of the run.
      rows: of a call; None: one for each device of the batch axes.
      temperatures: how many are given.
    """

    def __init__(
        self,
        frozen: Frozen,
        top: int,
        words: int,
        length: int,
        mesh: jax.sharding.Mesh,
        rows: int | None = None,
        temperatures: int = 2,
    ):
        self._mesh = mesh
        self.rows = rows or devices_of_batch(mesh)
        sharding = jax.NamedSharding(mesh, TOKENS)
        shape = (self.rows, length)
        batch = {
            name: jax.ShapeDtypeStruct(shape, field.dtype, sharding=sharding)
            for name, field in INPUTS.items()
        }
        whole = jax.NamedSharding(mesh, P())
        scales = jax.ShapeDtypeStruct((temperatures,), jnp.float32, sharding=whole)
        jitted = jax.jit(functools.partial(teacher_record, frozen, top, words))
        self._lowered = jitted.lower(frozen.model.abstract_sharded(), batch, scales)
        self._compiled: jax.stages.Compiled | None = None

    def compile(self) -> jax.stages.Compiled:
        """The program, compiled when it is asked for first."""
        self._compiled = self._compiled or self._lowered.compile()
        return self._compiled

    def of_batch(self, weights: ModelWeights, batch: Batch, temperatures: Sequence[float]) -> Batch:
        """The records of a step's batch [A, B, S]: [A, B, S, ...], laid out as it is."""
        given = {name: batch[name] for name in INPUTS}
        scales = self._temperatures(temperatures)
        program = self.compile()
        found = [program(weights, group, scales) for group in _groups(given)]
        return _joined(found, len(batch["tokens"]))

    def of_rows(self, weights: ModelWeights, rows: Rows, temperatures: Sequence[float]) -> Batch:
        """The records of as many rows as a call takes, whole on every device."""
        batch = put_batch({name: rows[name] for name in INPUTS}, self.rows, self._mesh)
        found = self.compile()(weights, _first(batch), self._temperatures(temperatures))
        return _whole(found)

    def _temperatures(self, values: Sequence[float]) -> jax.Array:
        return jax.device_put(np.asarray(values, np.float32), jax.NamedSharding(self._mesh, P()))


@jax.jit
def _groups(batch: Batch) -> list[Batch]:
    """[A, B, S] to batches with one row of each device: no row leaves its device."""

    def one_device(batch: Batch) -> list[Batch]:
        micro, here = batch["tokens"].shape[:2]
        return [
            {name: a[i, j : j + 1] for name, a in batch.items()}
            for i in range(micro)
            for j in range(here)
        ]

    return per_device(one_device, (STEP,), TOKENS)(batch)


@functools.partial(jax.jit, static_argnums=1)
def _joined(groups: list[Batch], micro: int) -> Batch:
    """The inverse of `_groups`."""

    def one_device(groups: list[Batch]) -> Batch:
        return {
            name: jnp.concatenate([g[name] for g in groups]).reshape(
                micro, -1, *groups[0][name].shape[1:]
            )
            for name in groups[0]
        }

    return per_device(one_device, (TOKENS,), STEP)(groups)


@jax.jit
def _first(batch: Batch) -> Batch:
    return jax.tree.map(lambda a: a[0], batch)


@jax.jit
def _whole(batch: Batch) -> Batch:
    return reshard(batch, jax.tree.map(lambda _: P(), batch))
