"""Stacked weights, for optimizers that look at rows, columns or singular values.

Weights are stacked over layers, experts and the pair of gate and up projections: `[L, in, out]`, `[L, E, D,
2, F]`. Such an optimizer must see each `[in, out]` alone, whatever the mesh divides.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.parallel.sharding import logical_axes

STACKED_AXES = (
    "layers",
    "experts",
    "some_experts",
    "pair",
)  # logical axes along which a weight holds matrices, or vectors, of their own


def stacked_dimensions(params: nnx.State) -> Any:
    """For each variable a `Stacked`: a tree of the state's structure."""
    return jax.tree.map(
        lambda v: v.replace(Stacked(logical_axes(v))),
        params,
        is_leaf=lambda v: isinstance(v, nnx.Variable),
    )


class Stacked:
    """Which dimensions of a weight tell its matrices apart. No pytree, so that it is a leaf of one."""

    def __init__(self, axes: tuple[str | None, ...]):
        self.dimensions = tuple(d for d, name in enumerate(axes) if name in STACKED_AXES)

    def first(self, a: jax.Array) -> jax.Array:
        """The array with these dimensions before all others."""
        return jnp.moveaxis(a, self.dimensions, range(len(self.dimensions)))

    def back(self, a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a, range(len(self.dimensions)), self.dimensions)

    def each(self, f: Callable) -> Callable:
        """f of one matrix to f of all, these dimensions first in every argument and result."""
        for _ in self.dimensions:
            f = jax.vmap(f)
        return f
