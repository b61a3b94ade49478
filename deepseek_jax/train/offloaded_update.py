"""The optimizer's update where part of the state is in the host's memory: of stacked weights layer by layer,
of the rest one by one.

Every optimizer of train/optimizer.py treats each layer of a stacked weight by itself. Clipping by the global
norm does not, so its factor comes first. The device then holds what the update of one layer needs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from deepseek_jax.config.options import Config
from deepseek_jax.parallel import offload
from deepseek_jax.train.optimizer import make_optimizer
from deepseek_jax.train.trainable import Multipliers


def update(
    config: Config,
    multipliers: Multipliers,
    grads: nnx.State,
    opt_state: Any,
    params: nnx.State,
    grad_norm: jax.Array,
    ok: jax.Array,
) -> tuple[nnx.State, Any]:
    """What the whole optimizer's `update` and `optax.apply_updates` do, each array in the memory where it is.

    Args:
      multipliers: of the learning rate.
      grads, params: in the layout of the optimizer's state. opt_state: of `make_optimizer`.
      grad_norm: float32, the global norm of the gradients. ok: bool, whether to update at all.

    Returns:
      (params, opt_state), as they were if not ok.
    """
    no_clip = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, grad_clip=0.0)
    )

    def one(held, grads):
        """The update of a group of parameters, or of one layer of it; all arrays are on the device."""
        params, opt_state = held
        optimizer = make_optimizer(no_clip, params, multipliers)
        grads = jax.tree.map(lambda g: _clipped(g, grad_norm, config.optimizer.grad_clip), grads)
        updates, new_state = optimizer.update(grads, opt_state, params)
        new = optax.apply_updates(params, updates), new_state
        return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, held)

    paths = [path for path, _ in nnx.to_flat_state(params)]
    stacks = [name for name in offload.STACKS if any(p[0] == name for p in paths)]
    groups = [lambda p, name=name: p[0] == name for name in stacks]
    singles = [lambda p, path=path: p == path for path in paths if path[0] not in stacks]
    # Counters are the same for all, but that a loop over layers leaves them as they were: a group without
    # weights moves them where stacks are all that learns.
    singles = singles or [lambda p, path=(): p == path]
    done = []
    for chosen in (*groups, *singles):
        held, of_grads = (_of_group((params, opt_state), chosen), _of_group(grads, chosen))
        if chosen in groups:
            done.append(offload.over_layers(one, held, of_grads))
        else:
            new = one(offload.to_device(held), offload.to_device(of_grads))
            done.append(jax.tree.map(offload.put, new, held))
    return jax.tree.map(
        lambda *parts: nnx.merge_state(*parts) if _is_state(parts[0]) else parts[-1],
        *done,
        is_leaf=_is_state,
    )


def _is_state(node: Any) -> bool:
    return isinstance(node, nnx.State)


def _of_group(tree: Any, chosen: Callable[[tuple], bool]) -> Any:
    """The tree with the chosen parameters alone in each of its States; what is not of a parameter stays."""

    def pick(node):
        return (
            nnx.from_flat_state([(p, v) for p, v in nnx.to_flat_state(node) if chosen(p)])
            if _is_state(node)
            else node
        )

    return jax.tree.map(pick, tree, is_leaf=_is_state)


def _clipped(g: jax.Array, norm: jax.Array, longest: float) -> jax.Array:
    """As optax.clip_by_global_norm, of a norm that is known."""
    return g if not longest else jnp.where(norm < longest, g, (g / norm.astype(g.dtype)) * longest)
