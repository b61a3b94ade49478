"""From a checkpoint to the state of this run, which may have other options than the run that wrote it."""

import os
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.options import Config
from deepseek_jax.data.contents import Contents
from deepseek_jax.parallel.weights import REPLICAS
from deepseek_jax.run.loop import Progress
from deepseek_jax.train import workdir as workdirs
from deepseek_jax.train.state import Layout, TrainState, from_tree, to_tree


class GoingOn:
    """What a start of a run knows of those before it."""

    def __init__(self, checkpoints: Checkpointer, workdir: str, config: Config, contents: Contents):
        """Args: contents: of the data that this start reads."""
        self._checkpoints, self._workdir = checkpoints, workdir
        self._config, self._contents = config, contents
        # Of a checkpoint of an earlier version config.json alone tells; it is read before this start writes
        # its own.
        written = os.path.exists(os.path.join(workdir, "config.json"))
        self._earlier = workdirs.read_history(workdir)[0] if written else None
        self._run: str | None = None

    def progress(self, step: int | None) -> Progress:
        """What there is besides the state to go on with after a checkpoint; None: from the beginning. Every
        process calls it.

        Raises:
          UserError: the checkpoint is of another run, model or tokenizer, or of other data and
          config.data.on_change does not allow them.
        """
        extra = {} if step is None else self._checkpoints.read_extra(step)
        if step is not None:
            workdirs.check_owner(self._workdir, self._config, extra)
            workdirs.check_model(self._workdir, self._config, extra)
        if self._run is None:
            self._run = workdirs.identity(self._workdir, self._config, extra)
        before = Progress() if step is None else Progress.of_extra(extra)
        return before._replace(run=self._run).resumed(
            step or 0, self._config, self._contents, self._earlier
        )


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
    before = (
        None
        if there is None
        else jax.tree.leaves(there, is_leaf=lambda a: hasattr(a, "shape"))[0].shape[0]
    )
    now = None if here is None else jax.tree.leaves(here)[0].shape[0]
    if before == now:
        tree, extra = checkpoints.restore(to_tree(wanted))
        return from_tree(tree, wanted), extra

    read = wanted._replace(
        residual=None
        if before is None or now is None
        else jax.tree.map(lambda a: _of_replicas(a, before), here)
    )
    state = from_tree(checkpoints.restore_params(to_tree(read)), read)
    if here is not None:
        share = lambda e, like: jnp.broadcast_to(
            jnp.sum(e, axis=0, keepdims=True) / now, like.shape, out_sharding=like.sharding
        )
        zero = lambda like: jnp.zeros(like.shape, like.dtype, out_sharding=like.sharding)
        make = lambda held: (
            jax.tree.map(zero, here) if held is None else jax.tree.map(share, held, here)
        )
        state = state._replace(residual=jax.jit(make)(state.residual))
    return state, checkpoints.read_extra()


def _of_replicas(like: jax.ShapeDtypeStruct, replicas: int) -> jax.ShapeDtypeStruct:
    """The residual [R, ...] of another number of replicas, to be read into this mesh."""
    mesh, spec = like.sharding.mesh, like.sharding.spec
    divided = replicas % mesh.shape[REPLICAS] == 0
    sharding = jax.NamedSharding(mesh, jax.P(REPLICAS if divided else None, *spec[1:]))
    return jax.ShapeDtypeStruct((replicas, *like.shape[1:]), like.dtype, sharding=sharding)
