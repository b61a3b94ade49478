"""Which numbers dropout drops: a pure function of (seed, row of the data order, layer, linear map, place).

So a step computes the same on every mesh and for every accumulation, the backward pass draws what the forward
pass drew, and the next epoch draws anew. The model says which layer it is in around each one, as taps.py is
told what is asked for; outside of training nothing is said, and nothing is dropped.

The bits of a number are a hash of where it is, PCG4D of Jarzynski and Olano (Hash Functions for GPU
Rendering, JCGT 9(3), 2020): a few integer operations on each number, wherever it lies, that fuse with what
reads it. JAX's generator takes some hundred, and a key for each token to be the same on every mesh.

Shape letters: layers.py.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

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

    def index(axis: int) -> jax.Array:
        return lax.broadcasted_iota(jnp.uint32, x_BSF.shape, axis, out_sharding=spec)

    layer = place.layer.astype(jnp.uint32)
    a, b, c, d = _hash(jnp.uint32(place.seed), layer, jnp.uint32(site), jnp.uint32(_PURPOSE))
    row_B11 = place.row_B[:, None, None]
    bits_BSF = _hash(row_B11.astype(jnp.uint32) ^ a, index(1) ^ b, index(2) ^ c, d)[0]
    kept_BSF = (bits_BSF >= jnp.uint32(round(rate * 2**32))) | (row_B11 < 0)
    scale_B11 = jnp.where(row_B11 < 0, 1.0, 1 / (1 - rate)).astype(x_BSF.dtype)
    return jnp.where(kept_BSF, x_BSF * scale_B11, 0).astype(x_BSF.dtype)


def _hash(*v: jax.Array) -> tuple[jax.Array, ...]:
    """Four uint32 of four, which broadcast with each other."""
    x, y, z, w = (n * jnp.uint32(1664525) + jnp.uint32(1013904223) for n in v)
    for last in (False, True):
        x, y = x + y * w, y + z * (x + y * w)
        z, w = z + x * y, w + y * (z + x * y)
        if not last:
            x, y, z, w = (n ^ (n >> 16) for n in (x, y, z, w))
    return x, y, z, w
