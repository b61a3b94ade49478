"""A step's batch over the mesh: sequences of the global batch to arrays [A, B, ...], A micro-batches of B
sequences each.
"""

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.config.options import Config
from deepseek_jax.data.fields import Fields, Rows
from deepseek_jax.parallel.mesh import BATCH_AXES
from deepseek_jax.train.optimizer import sequences_at


def batch_sharding(mesh: jax.sharding.Mesh, ndim: int) -> NamedSharding:
    """Of an array [A, B, ...] of so many axes: sequences over the batch axes."""
    return NamedSharding(mesh, P(None, BATCH_AXES, *[None] * (ndim - 2)))


def put_batch(rows: Rows, micro_batch: int, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Sequences of the global batch, [n, ...], to arrays [A, B, ...] over the mesh; each process hands over
    its own shards.

    Raises:
      ValueError: the arrays differ in n, or it is not a multiple of the micro-batch.
    """
    counts = {name: a.shape[0] if a.ndim else 0 for name, a in rows.items()}
    for name, n in counts.items():
        if n != next(iter(counts.values())) or n % micro_batch:
            raise ValueError(
                f"{name!r} has {n} sequences; all fields need the same number, a multiple of the "
                f"micro-batch of {micro_batch}: {counts}"
            )

    def put(a: np.ndarray) -> jax.Array:
        a = a.reshape(-1, micro_batch, *a.shape[1:])
        sharding = batch_sharding(mesh, a.ndim)
        return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])

    return {k: put(v) for k, v in rows.items()}


def rows_here(micro_batch: int, mesh: jax.sharding.Mesh) -> np.ndarray:
    """bool [micro_batch]: which of a micro-batch's sequences `put_batch` takes from this process."""
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    out = np.zeros(micro_batch, bool)
    for (rows,) in sharding.addressable_devices_indices_map((micro_batch,)).values():
        out[rows] = True
    return out


def abstract_batch(
    fields: Fields, config: Config, mesh: jax.sharding.Mesh, step: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """What `put_batch` makes of the sequences of the step after `step` finished ones."""
    micro_batches = sequences_at(config, step) // config.micro_batch

    def array(field) -> jax.ShapeDtypeStruct:
        of_one = field.shape(config.train.sequence_length)
        shape = (micro_batches, config.micro_batch, *of_one)
        return jax.ShapeDtypeStruct(shape, field.dtype, sharding=batch_sharding(mesh, len(shape)))

    return {name: array(field) for name, field in fields.items()}
