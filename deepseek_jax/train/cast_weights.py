"""Weights in the compute dtype, cast once a step: what the micro-batches read, and what is differentiated.

Cast by the layer that uses it, a float32 weight is read whole in every micro-batch, in forward and again
where backward recomputes, and its gradient, which arises in the compute dtype, is written wider than it is.
One pass outside the loops over micro-batches and layers takes the place of all these.

The numbers stay as they are. A weight that has one use in a micro-batch is rounded once in either place, and
its gradient arrives there in the compute dtype in either case. JAX adds up the gradients of several uses in
the dtype of what is differentiated, so whatever has several within what is differentiated at once is left
float32, and is cast where it is used:

    embedding                  a row for every occurrence of a token; looked up in float32 anyway
    output head with MTP       a use for each depth
    projection to a teacher    as it maps states of several layers
    all, with stages           the pipeline differentiates all micro-batches at once

Micro-batches are differentiated one by one, and gradients.py widens each before it adds it up. Norms and the
router are used in float32. Weights in the host's memory stay float32 too: nothing computes there. So do those
that do not learn: a copy of them would be memory that no narrower gradient makes up for.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config.options import Config
from deepseek_jax.parallel import offload
from deepseek_jax.train import projection

FLOAT32_AXES = frozenset({"norm", "router"})  # logical axes of weights that are used in float32
MANY_USES = ("embed_tokens", projection.NAME)  # first names of their paths
HEAD = "lm_head"


def in_compute_dtype(config: Config, params: nnx.State) -> nnx.State:
    """Parameters that learn, [L, ...] in float32, as a step's micro-batches use them: each in the layout that
    it has, in train.dtype or float32. Under `jax.set_mesh`.
    """
    if config.train.dtype == "float32" or jax.sharding.get_abstract_mesh().shape["stage"] > 1:
        return params
    dtype = jnp.dtype(config.train.dtype)

    def cast(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        w = variable.get_value()
        return variable.replace(w.astype(dtype)) if is_cast(config, path, variable) else variable

    return nnx.from_flat_state([(path, cast(path, v)) for path, v in nnx.to_flat_state(params)])


def is_cast(config: Config, path: tuple[Any, ...], variable: nnx.Variable) -> bool:
    """Whether a parameter has one use in a micro-batch, in the compute dtype."""
    axes = variable.get_metadata()["out_sharding"]
    several = (*MANY_USES, HEAD) if config.model.num_nextn_predict_layers else MANY_USES
    return (
        path[0] not in several
        and not FLOAT32_AXES & set(axes)
        and not offload.on_host(variable.get_value())
    )


def widened(grads: nnx.State) -> nnx.State:
    """Gradients in float32, as the optimizer and its norm take them."""
    return jax.tree.map(lambda g: g if g.dtype == jnp.float32 else g.astype(jnp.float32), grads)
