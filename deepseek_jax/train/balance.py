"""The selection bias of the router: moved once a step from the expert counts of the whole global batch,
without a gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config.options import Config


def update_bias(bias: Any, counts_LE: jax.Array, step: jax.Array, config: Config) -> Any:
    """Auxiliary-loss-free balancing (arXiv:2408.15664): up where an expert had less than the mean load, down
    where more.

    Args:
      bias: the state of `e_score_correction_bias`: [L, E] for the stacked layers, [E] for each MTP layer.
      counts_LE: int32 counts of the whole step's global batch, MTP layers last.
      step: int32, finished steps.
    """
    moving = step < round(config.moe.bias_update_fraction * config.train.steps)

    def move(b, counts):
        # In integers: a mean rounded in float32 would move experts that have exactly the mean load.
        mean, rest = jnp.divmod(jnp.sum(counts, axis=-1, keepdims=True), counts.shape[-1])
        up = (counts < mean) | ((counts == mean) & (rest > 0))
        new = b + config.moe.bias_update_rate * (up.astype(jnp.float32) - (counts > mean))
        new = new - jnp.mean(new, axis=-1, keepdims=True) if config.moe.bias_centre else new
        return jnp.where(moving, new, b)

    leaves, tree = jax.tree.flatten(bias)
    # A state's leaves are ordered by name: "layers" before "mtp", as in the counts.
    out, row = [], 0
    for leaf in leaves:
        n = leaf.shape[0] if leaf.ndim == 2 else 1
        out.append(move(leaf, counts_LE[row : row + n].reshape(leaf.shape)))
        row += n
    return jax.tree.unflatten(tree, out)
