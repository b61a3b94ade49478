"""Compiled steps of an objective, with its frozen model, on the mesh of a config: for comparing meshes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from deepseek_jax.config.options import IGNORE, Config
from deepseek_jax.objectives.base import Objective
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.train import state, step
from deepseek_jax.train.batch import abstract_batch, put_batch
from tests.support import conversion, invariance

Moments = list[tuple[str, np.ndarray]]


def padded_rows(i: int, length: int) -> dict[str, np.ndarray]:
    """Batch `i` of `invariance.rows`, its sequences cut to `length` > 12 tokens and four of them padded from
    token 12 on: micro-batches have different numbers of tokens."""
    text = {name: a[:, :length].copy() for name, a in invariance.rows(i).items()}
    for name, nothing in (("segment_ids", 0), ("targets", IGNORE), ("next_tokens", -1)):
        text[name][[0, 1, 2, 5], 12:] = nothing
    return text


class Steps:
    """Steps of an objective from `invariance.initial_state`, on the first devices there are.

    Args:
        objective: what is learnt; its frozen model, if it has one, is loaded here.
        rows: the fields of a batch by its number; those that the objective does not have are left out.
        own: parameters that the objective adds to those of the model, on the host.
    """

    def __init__(
        self,
        config: Config,
        objective: Objective,
        rows: Callable[[int], dict[str, np.ndarray]],
        own: Callable[[], nnx.State] | None = None,
    ):
        self.config = config
        self.objective = objective
        self.rows = rows
        self.own = own
        self.mesh = make_mesh(config, jax.devices()[: invariance.devices_of(config)])
        with jax.set_mesh(self.mesh):
            frozen = objective.frozen(self.mesh)
            self.layout = state.make_layout(config, self.mesh, frozen)
            self.frozen = frozen and frozen.load()

    @functools.cached_property
    def lowered(self) -> Any:
        with jax.set_mesh(self.mesh):
            train_step = jax.jit(
                step.make_train_step(self.config, self.layout, self.objective), donate_argnums=0
            )
            batch = abstract_batch(self.objective.fields, self.config, self.mesh, 0)
            args = self.layout.abstract_sharded(), batch
            return train_step.lower(*args, self.layout.abstract_frozen())

    @functools.cached_property
    def program(self) -> Any:
        with jax.set_mesh(self.mesh):
            return self.lowered.compile()

    def start(self) -> state.TrainState:
        """The same weights on every mesh, and an optimizer that has seen nothing."""
        fresh = invariance.initial_state(self.config.model)
        params = nnx.merge_state(fresh.params, self.own()) if self.own else fresh.params
        zeros = functools.partial(jax.tree.map, lambda a: np.zeros(a.shape, a.dtype))
        abstract = self.layout.abstract
        return jax.device_put(
            fresh._replace(
                params=params,
                opt_state=zeros(abstract.opt_state),
                residual=zeros(abstract.residual),
            ),
            self.layout.shardings,
        )

    def batch(self, i: int) -> dict[str, jax.Array]:
        rows = self.rows(i)
        used = {name: rows[name] for name in self.objective.fields}
        return put_batch(used, self.config.micro_batch, self.mesh)

    def run(self, s: state.TrainState, i: int) -> tuple[state.TrainState, step.StepMetrics]:
        with jax.set_mesh(self.mesh):
            return self.program(s, self.batch(i), self.frozen)

    def first(self) -> tuple[step.StepMetrics, Moments]:
        """What the first step reports, and `moments` after it, on the host."""
        s, metrics = self.run(self.start(), 0)
        return jax.tree.map(np.asarray, metrics), moments(s)


def moments(s: state.TrainState) -> Moments:
    """Adam's first moments by parameter: the clipped gradients times a constant."""
    return [
        (conversion.path_of(path), np.asarray(a))
        for path, a in jax.tree_util.tree_leaves_with_path(s.opt_state)
        if ".mu" in jax.tree_util.keystr(path)
    ]
