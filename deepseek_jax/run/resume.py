"""From a checkpoint to the state of this run, which may have other options than the run that wrote it."""

import os
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.options import Config, LoraConfig
from deepseek_jax.config.stages import of_config
from deepseek_jax.data.contents import Contents
from deepseek_jax.parallel import offload
from deepseek_jax.parallel.weights import REPLICAS
from deepseek_jax.run import stages
from deepseek_jax.run.progress import Progress
from deepseek_jax.tensorfile.arrays import Tree, flatten
from deepseek_jax.train import projection, trainable
from deepseek_jax.train import workdir as workdirs
from deepseek_jax.train.state import Layout, TrainState, from_tree, saved, to_tree, zero_params

NO_LORA = LoraConfig()


class Continuation:
    """What a start of a run goes on with, besides the state.

    Args:
      contents: of the data that this start reads.
    """

    def __init__(self, checkpoints: Checkpointer, workdir: str, config: Config, contents: Contents):
        self._checkpoints = checkpoints
        self._workdir = workdir
        self._config = config
        self._contents = contents
        # Checkpoints of earlier versions do not say what their steps read; config.json does, until
        # this start writes its own.
        written = os.path.exists(os.path.join(workdir, "config.json"))
        self._earlier = workdirs.read_history(workdir)[0] if written else None
        self._run: str | None = None

    def progress(self, step: int | None) -> Progress:
        """What goes on after the checkpoint of a step. Every process calls it.

        Args:
          step: None for a run that begins.

        Raises:
          UserError: the checkpoint is of another run, model or tokenizer, or of other data and
            config.data.on_change does not allow them.
        """
        extra = {} if step is None else self._checkpoints.read_extra(step)
        if step is not None:
            workdirs.check_owner(self._workdir, self._config, extra)
            workdirs.check_model(self._workdir, self._config, extra)
            stages.check(of_config(self._config), extra.get("stages", ()), step)
        if self._run is None:
            self._run = workdirs.identity(self._workdir, self._config, extra)
        before = Progress() if step is None else Progress.of_extra(extra)
        return before._replace(run=self._run).resumed(
            step or 0, self._config, self._contents, self._earlier
        )


def restore(
    checkpoints: Checkpointer,
    layout: Layout,
    first_step: int = 0,
    begins: bool = False,
    lora: LoraConfig = NO_LORA,
) -> tuple[TrainState, dict[str, Any]]:
    """The newest checkpoint, in the shards of this mesh, and its `extra`. The base of LoRA is not in it.

    The residual of compressed gradients follows the options: without compression it is left out;
    where the checkpoint has none it is zero; with another number of replicas each gets an equal share
    of the sum, which is what the updates still owe.

    Where other parameters learn than did (config.optimizer.lr_multipliers, config.esft.experts), the
    optimizer begins anew for all of them, and the residual: moments of weights that have just begun to
    learn would need a correction of their own. The learning rate goes on where it was. So too where the
    projection to a teacher's hidden states has come, gone or changed its shape; a new one is drawn.

    So does a stage of a run, at its first step, with its schedule: whatever learnt before it. The scale of
    the loss in float16 goes on as it was found.

    Args:
      layout: of the state.
      first_step: steps that were done before the stage of this layout.
      begins: whether the checkpoint is that of the end of the stage before.
      lora: the options of the run.

    Raises:
      UserError: as `Checkpointer.restore`.
    """
    abstract = saved(layout.abstract_sharded(), lora)
    stored = checkpoints.shapes()
    residual = abstract.residual
    same_projection = _same_projection(stored, layout)
    if begins or not same_projection or _others_learn(checkpoints, stored, layout):
        read = abstract._replace(opt_state=None, residual=None, esft=None)
        if not same_projection:
            read = read._replace(params=projection.split(read.params)[0])
        state = _begin(layout, from_tree(checkpoints.restore_params(to_tree(read)), read))
        if not same_projection:
            params = trainable.join(state.params, layout.new_projection())
            state = state._replace(params=params)
        # Skipped steps of a stage are not told from those before it: its schedule may be ahead by as many.
        updates = jnp.minimum(state.step - state.skipped_steps, state.step - first_step)
        opt_state = _fresh_optimizer(layout, updates)
        residual = None if residual is None else _residual_of(None, residual)
        if jax.process_index() == 0 and not begins:
            print(
                f"{'optimizer':<17}begins anew: other weights learn than in the checkpoint "
                "(config.optimizer.lr_multipliers, config.esft.experts, config.distill.hidden_layers)"
            )
        return state._replace(opt_state=opt_state, residual=residual), checkpoints.read_extra()

    residual_there = stored.get("residual")
    before = None if residual_there is None else _replicas(residual_there)
    now = None if residual is None else _replicas(residual)
    if before == now:
        tree, extra = checkpoints.restore(to_tree(abstract))
        return _begin(layout, from_tree(tree, abstract)), extra

    read = abstract._replace(residual=None)
    if before is not None and now is not None:
        read = abstract._replace(residual=jax.tree.map(lambda a: _of_replicas(a, before), residual))
    state = _begin(layout, from_tree(checkpoints.restore_params(to_tree(read)), read))
    if residual is not None:
        state = state._replace(residual=_residual_of(state.residual, residual))
    return state, checkpoints.read_extra()


def _begin(layout: Layout, state: TrainState) -> TrainState:
    """The state with the stacks of the experts that learn, which a checkpoint has among all others."""
    if not layout.multipliers.experts:
        return state
    params, frozen = layout.begin(state.weights().params)
    params = trainable.join(params, projection.split(state.params)[1])
    index = jax.device_put(dict(layout.multipliers.experts), layout.shardings.esft)
    return state._replace(params=params, frozen=frozen, esft=index)


def _others_learn(checkpoints: Checkpointer, stored: Tree, layout: Layout) -> bool:
    """Whether a checkpoint has the state of this optimizer, but of other parameters."""
    wanted = to_tree(layout.abstract_sharded())
    there, here = (flatten(tree.get("opt_state", {})).keys() for tree in (stored, wanted))
    if there == here and _same_experts(checkpoints, stored, layout):
        return False
    weights = flatten(wanted["params"]).keys()

    def kinds(names: Iterable[str]) -> set[str]:
        """What the optimizer holds of any parameter: "1/0/mu"."""
        parts = [name.split("/") for name in names]
        ends = [{"/".join(p[i:]): i for i in range(len(p))} for p in parts]
        cut = [min((i for end, i in e.items() if end in weights), default=len(e)) for e in ends]
        return {"/".join(p[:i]) for p, i in zip(parts, cut, strict=True)}

    def is_of_part(kind: str) -> bool:
        """Whether it is there only where some of the weights learn: muon's, of matrices and of the rest."""
        return "inner_states" in kind.split("/")

    before, now = kinds(there), kinds(here)
    parts = [set(filter(is_of_part, k)) for k in (before, now)]
    if before - parts[0] != now - parts[1] or bool(parts[0]) != bool(parts[1]):
        return False  # lion has what adamw has, but for the second moment
    return parts[0] <= parts[1] or parts[1] <= parts[0]


def _same_projection(stored: Tree, layout: Layout) -> bool:
    """Whether a checkpoint has the projection (train/projection.py) of this run, or both have none."""
    wanted = to_tree(layout.abstract_sharded())["params"]
    there, here = (
        {name: tuple(a.shape) for name, a in flatten(params.get(projection.NAME, {})).items()}
        for params in (stored.get("params", {}), wanted)
    )
    return there == here


def _same_experts(checkpoints: Checkpointer, stored: Tree, layout: Layout) -> bool:
    """Whether the experts that learn are those of the checkpoint."""
    experts, there = layout.multipliers.experts, flatten(stored.get("esft", {}))
    if {name: tuple(leaf.shape) for name, leaf in there.items()} != {
        name: index.shape for name, index in experts.items()
    }:
        return False
    if not experts:
        return True
    wanted = {"esft": layout.abstract_sharded().esft}
    found = checkpoints.restore_params(wanted)["esft"]
    return all(np.array_equal(jax.device_get(found[name]), experts[name]) for name in experts)


def _fresh_optimizer(layout: Layout, updates: jax.Array) -> Any:
    """The optimizer's state at its beginning, but for its schedule, which is after so many updates."""

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def create(updates: jax.Array) -> Any:
        fresh = layout.optimizer.init(zero_params(layout))
        fresh = jax.tree.map(
            lambda node: node._replace(count=updates) if is_schedule(node) else node,
            fresh,
            is_leaf=is_schedule,
        )
        return offload.to(fresh, layout.shardings.opt_state)

    return jax.jit(create, out_shardings=layout.shardings.opt_state)(updates)


def _replicas(residual: Any) -> int:
    leaves = jax.tree.leaves(residual, is_leaf=lambda a: hasattr(a, "shape"))
    return leaves[0].shape[0]


def _residual_of(saved: Any, like: Any) -> Any:
    """The residual [R, ...] of this run: equal shares of what was saved, or zeros where nothing was."""

    def share(saved_one: jax.Array, like_one: jax.ShapeDtypeStruct) -> jax.Array:
        mean = jnp.sum(saved_one, axis=0, keepdims=True) / like_one.shape[0]
        return jnp.broadcast_to(mean, like_one.shape, out_sharding=like_one.sharding)

    def zeros(like_one: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros(like_one.shape, like_one.dtype, out_sharding=like_one.sharding)

    def make(saved: Any) -> Any:
        return jax.tree.map(zeros, like) if saved is None else jax.tree.map(share, saved, like)

    return jax.jit(make)(saved)


def _of_replicas(like: jax.ShapeDtypeStruct, replicas: int) -> jax.ShapeDtypeStruct:
    """The residual [R, ...] of another number of replicas, to be read into this mesh."""
    mesh = like.sharding.mesh
    spec = like.sharding.spec
    divided = replicas % mesh.shape[REPLICAS] == 0
    sharding = jax.NamedSharding(mesh, jax.P(REPLICAS if divided else None, *spec[1:]))
    return jax.ShapeDtypeStruct((replicas, *like.shape[1:]), like.dtype, sharding=sharding)
