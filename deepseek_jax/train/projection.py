"""Parameters of a run that are not of its model: the map from its hidden states to those of a frozen model,
`Frozen.projection`.

They learn with the model's: in TrainState.params they stand under `projection`, and so have gradients,
moments and a place in the rule table and in checkpoints as any. The model is put together without them:
evaluation, generation and exports know nothing of them.
"""

import jax
from flax import nnx

from deepseek_jax.objectives.base import Frozen, FrozenOutput
from deepseek_jax.train import trainable

NAME = "projection"  # no attribute of the model is called so


def create(frozen: Frozen | None) -> nnx.State:
    """The parameters as a run begins with them, under NAME; none without a projection."""
    if frozen is None or frozen.projection is None:
        return trainable.NONE
    drawn = nnx.to_flat_state(nnx.state(frozen.projection(), nnx.Param))
    return nnx.from_flat_state([((NAME, *path), v) for path, v in drawn])


def abstract(frozen: Frozen | None) -> nnx.State:
    """Their shapes."""
    return jax.eval_shape(lambda: create(frozen))


def split(params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """(the others, those under NAME) of parameters, or of anything by parameter."""
    flat = nnx.to_flat_state(params)
    own = [(path, v) for path, v in flat if path[0] == NAME]
    if not own:
        return params, trainable.NONE
    rest = [(path, v) for path, v in flat if path[0] != NAME]
    return nnx.from_flat_state(rest), nnx.from_flat_state(own)


def with_output(out: FrozenOutput | None, own: nnx.State) -> FrozenOutput | None:
    """What the frozen model makes of a batch, with the parameters that lead to it."""
    if out is None or not own:
        return out
    flat = [(path[1:], v) for path, v in nnx.to_flat_state(own)]
    return out._replace(projection=nnx.from_flat_state(flat))
