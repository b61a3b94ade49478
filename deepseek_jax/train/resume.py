"""From a checkpoint to the state of this run, which may have other options than the run that wrote it."""

from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.parallel.weights import REPLICAS
from deepseek_jax.train.state import Layout, TrainState, from_tree, to_tree


def restore(checkpoints: Checkpointer, layout: Layout) -> tuple[TrainState, dict[str, Any]]:
    """The newest checkpoint, in the shards of this mesh, and its `extra`.

    The residual of compressed gradients follows the options: without compression it is left out; where the checkpoint has none it is
    zero; with another number of replicas each gets an equal share of the sum, which is what the updates still owe.

    Raises:
      UserError: as `Checkpointer.restore`.
    """
    wanted = layout.abstract_sharded()
    there = checkpoints.shapes().get("residual")
    here = wanted.residual
    before = None if there is None else jax.tree.leaves(there, is_leaf=lambda a: hasattr(a, "shape"))[0].shape[0]
    now = None if here is None else jax.tree.leaves(here)[0].shape[0]
    if before == now:
        tree, extra = checkpoints.restore(to_tree(wanted))
        return from_tree(tree, wanted), extra

    read = wanted._replace(residual=None if before is None or now is None else jax.tree.map(lambda a: _of_replicas(a, before), here))
    state = from_tree(checkpoints.restore_params(to_tree(read)), read)
    if here is not None:
        share = lambda e, like: jnp.broadcast_to(jnp.sum(e, axis=0, keepdims=True) / now, like.shape, out_sharding=like.sharding)
        zero = lambda like: jnp.zeros(like.shape, like.dtype, out_sharding=like.sharding)
        make = lambda held: jax.tree.map(zero, here) if held is None else jax.tree.map(share, held, here)
        state = state._replace(residual=jax.jit(make)(state.residual))
    return state, checkpoints.read_extra()


def _of_replicas(like: jax.ShapeDtypeStruct, replicas: int) -> jax.ShapeDtypeStruct:
    """The residual [R, ...] of another number of replicas, to be read into this mesh."""
    mesh, spec = like.sharding.mesh, like.sharding.spec
    divided = replicas % mesh.shape[REPLICAS] == 0
    sharding = jax.NamedSharding(mesh, jax.P(REPLICAS if divided else None, *spec[1:]))
    return jax.ShapeDtypeStruct((replicas, *like.shape[1:]), like.dtype, sharding=sharding)
