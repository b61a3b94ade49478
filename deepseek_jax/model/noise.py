"""Which numbers dropout drops: a pure function of (seed, row of the data order, layer, linear map, place).

So a step computes the same on every mesh and for every accumulation, the backward pass draws what the forward
pass drew, and the next epoch draws anew. The model says which layer it is in around each one, as taps.py is
told what is asked for; outside of training nothing is said, and nothing is dropped.

Shape letters: layers.py.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.parallel.mesh import per_device

_PURPOSE = 0x4C6F5241  # among all that is drawn by the run's seed


class Place(NamedTuple):
    """Where in training a layer is."""

    seed: int
    row_B: (
        jax.Array
    )  # int32, the number of each sequence in the data order; below 0: nothing is dropped
    layer: jax.Array  # int32 []


_place: contextvars.ContextVar[Place | None] = contextvars.ContextVar("place", default=None)


@contextlib.contextmanager
def of_layer(place: Place | None) -> Iterator[None]:
    """The layer that is traced inside; None: without dropout."""
    before = _place.set(place)
    try:
        yield
    finally:
        _place.reset(before)


@jax.named_scope("dropout")
def dropped(x_BSF: jax.Array, rate: float, site: int) -> jax.Array:
    """x with a share `rate` of its numbers 0 and the others divided by 1 - rate.

    Args:
      x_BSF: in the compute dtype.
      rate: 0 drops nothing.
      site: tells the linear maps of a layer apart.
    """
    place = _place.get()
    if not rate or place is None:
        return x_BSF
    spec = jax.typeof(x_BSF).sharding.spec
    seed = place.seed

    def one_device(x_BSF: jax.Array, row_B: jax.Array, layer: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), _PURPOSE)
        key = jax.random.fold_in(jax.random.fold_in(key, layer), site)
        # Widths that the tensor axis divides are drawn whole, so that no mesh changes what is drawn.
        divided = spec[-1] is not None
        width = x_BSF.shape[-1]
        first = jax.lax.axis_index("tensor") * width if divided else 0
        drawn = width * jax.lax.axis_size("tensor") if divided else width

        def of_token(row: jax.Array, token: jax.Array) -> jax.Array:
            of_one = jax.random.fold_in(jax.random.fold_in(key, row), token)
            kept = jax.random.bernoulli(of_one, 1 - rate, (drawn,))
            return jax.lax.dynamic_slice_in_dim(kept, first, width) if divided else kept

        tokens_S = jnp.arange(x_BSF.shape[1])
        kept_BSF = jax.vmap(lambda row: jax.vmap(lambda t: of_token(row, t))(tokens_S))(row_B)
        trains_B11 = (row_B >= 0)[:, None, None]
        scaled_BSF = jnp.where(kept_BSF, x_BSF / (1 - rate), 0).astype(x_BSF.dtype)
        return jnp.where(trains_B11, scaled_BSF, x_BSF)

    draw = per_device(one_device, (spec, jax.P(spec[0]), jax.P()), spec)
    return draw(x_BSF, place.row_B, place.layer)
