"""Some weights of every kind, and what an optimizer makes of them: by the program on any mesh, and by a
reference one matrix at a time, in float64.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from deepseek_jax.config.options import Config
from deepseek_jax.model.layers import param
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.train.optimizer import make_optimizer
from tests.support import conversion, invariance

SHAPES = {
    "q_proj": ((3, 16, 24), ("layers", "embed", "heads")),
    "gate_up_proj": ((3, 4, 16, 2, 8), ("layers", "experts", "expert_embed", "pair", "expert_mlp")),
    "down_proj": ((4, 8, 16), ("experts", "expert_mlp", "expert_embed")),
    "router": ((16, 4), ("embed", "router")),
    "norm": ((3, 16), ("layers", "norm")),
    "embed_tokens": ((20, 16), ("vocab", "embed")),
}

# (name, gradient, weight, memory of this matrix, step from 1, weight decay or 0) -> what is taken from the
# weight, learning rate included
Step = Callable[[str, np.ndarray, np.ndarray, dict[str, Any], int, float], np.ndarray]


class Weights(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        for name, (shape, axes) in SHAPES.items():
            setattr(self, name, param(rngs, nnx.initializers.zeros, shape, axes))


def numbers(seed: int) -> dict[str, np.ndarray]:
    """Those of seed 0 are the weights, of the others the gradients of that step."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape).astype(np.float32) * 0.3
        for name, (shape, _) in SHAPES.items()
    }


def parts_of(name: str) -> list[tuple[Any, ...]]:
    """The indices of a weight's matrices or vectors."""
    every = slice(None)
    parts: dict[str, list[tuple[Any, ...]]] = {
        "q_proj": [(i,) for i in range(3)],
        "gate_up_proj": [(i, e, every, p) for i in range(3) for e in range(4) for p in range(2)],
        "down_proj": [(e,) for e in range(4)],
        "norm": [(i,) for i in range(3)],
    }
    return parts.get(name, [()])


def updated(config: Config, steps: int) -> tuple[dict[str, np.ndarray], tuple]:
    """The weights after these updates by the optimizer of a config, on its mesh, and its last state."""
    abstract = nnx.split(nnx.eval_shape(Weights), nnx.Param)[1]

    def fill(values: dict[str, np.ndarray]):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: values[conversion.path_of(path)], abstract
        )

    mesh = make_mesh(config, jax.devices()[: invariance.devices_of(config)])
    with jax.set_mesh(mesh):
        params = conversion.place(fill(numbers(0)), config)
        optimizer = make_optimizer(config, abstract)
        opt_state = jax.jit(optimizer.init)(params)

        @jax.jit
        def update(params, opt_state, grads):
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        for i in range(1, steps + 1):
            params, opt_state = update(
                params, opt_state, conversion.place(fill(numbers(i)), config)
            )
    return {
        conversion.path_of(path): np.asarray(a)
        for path, a in jax.tree_util.tree_leaves_with_path(params)
    }, opt_state


def reference(config: Config, step: Step, steps: int) -> dict[str, np.ndarray]:
    """The same in float64, clipping as the program does."""
    o = config.optimizer
    weights = {name: a.astype(np.float64) for name, a in numbers(0).items()}
    memory: dict[tuple[str, int], dict[str, Any]] = {
        (name, i): {} for name in weights for i in range(len(parts_of(name)))
    }
    for t in range(1, steps + 1):
        grads = {name: a.astype(np.float64) for name, a in numbers(t).items()}
        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        factor = min(1, o.grad_clip / norm) if o.grad_clip else 1
        for name, g in grads.items():
            decay = 0.0 if name == "norm" else o.weight_decay
            for i, part in enumerate(parts_of(name)):
                w = weights[name][part]
                weights[name][part] = w - step(name, g[part] * factor, w, memory[name, i], t, decay)
    return weights
