"""The fit of a shared core and its wrappers to the experts of one layer and projection, by Adam in float32.

It minimises the sum of |W_e - W^_e|^2 over the experts. Adam's step at a learning rate is the same for every
number, whatever the size of the array that it is in, and a core is ten times smaller than wrappers: each
array's rate is in proportion to its own root mean square, and falls to zero along half a cosine. What is
returned is the best of all steps, the start among them.

Shape letters: shared_core_start.py.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deepseek_jax.compress import shared_core_start
from deepseek_jax.compress.shared_core_start import Factors
from deepseek_jax.model.shared_core import EXACT, product

RMS = 1 / 32  # of an array whose rate is the one that is asked for
CHUNK = 25  # steps of one call


class Losses(NamedTuple):
    """Relative: |W - W^|^2 / |W|^2, of all experts of a layer and projection together."""

    mean: float  # of the mean of the experts, where MoE_Factorize_Compress begins
    start: float  # of the closed form
    end: float


class _State(NamedTuple):
    factors: Factors
    optimizer: tuple
    best: Factors
    lowest: jax.Array  # float32: the loss of `best`


def fit(
    weights_EIO: np.ndarray,
    rank: int,
    steps: int,
    lr: float,
    seed: int = 0,
    advance: Callable[[int], None] = lambda steps: None,
) -> tuple[Factors, Losses]:
    """Core and wrappers of experts.

    Args:
      weights_EIO: float32, on the host or the device.
      rank: R, at most I and O.
      steps: of Adam; 0: the closed form.
      lr: of an array with the root mean square RMS.
      seed: of what is random.
      advance: called with every few steps that are done.
    """
    w_EIO = jnp.asarray(weights_EIO, jnp.float32)
    key = jax.random.key(seed)
    total = float(jnp.sum(jnp.square(w_EIO))) or 1.0
    mean = float(_mean_loss(w_EIO)) / total
    begin = shared_core_start.closed_form(w_EIO, rank, key)
    start = float(_loss(begin, w_EIO)) / total
    if start > mean:  # rounding, where the mean is exact
        begin, start = shared_core_start.guide(w_EIO, rank, key), mean
    rates = jax.tree.map(lambda a: lr * _rms(a) / RMS, begin)
    adam = optax.scale_by_adam().init(begin)
    # Copies, since the loop is given its state's memory.
    state = _State(begin, adam, jax.tree.map(jnp.copy, begin), jnp.float32(start * total))
    for done in range(0, steps, CHUNK):
        count = min(CHUNK, steps - done)
        state = _run(state, w_EIO, rates, jnp.asarray([done, done + count]), jnp.float32(steps))
        advance(count)
    last = _loss(state.factors, w_EIO)
    if steps and float(last) < float(state.lowest):
        state = state._replace(best=state.factors, lowest=last)
    return state.best, Losses(mean, start, float(state.lowest) / total)


def _rms(a: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(a)))


@jax.jit
def _mean_loss(w_EIO: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(w_EIO - jnp.mean(w_EIO, axis=0)))


@jax.jit
def _loss(factors: Factors, w_EIO: jax.Array) -> jax.Array:
    """float32: the sum of squares."""
    return jnp.sum(jnp.square(w_EIO - product(*factors, precision=EXACT)))


@functools.partial(jax.jit, donate_argnums=0)
def _run(
    state: _State, w_EIO: jax.Array, rates: Factors, span: jax.Array, steps: jax.Array
) -> _State:
    """Steps span[0] to span[1] of all."""
    adam = optax.scale_by_adam()

    def step(i: jax.Array, state: _State) -> _State:
        loss, gradients = jax.value_and_grad(_loss)(state.factors, w_EIO)
        better = loss < state.lowest
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), state.factors, state.best)
        updates, optimizer = adam.update(gradients, state.optimizer)
        share = 0.5 * (1 + jnp.cos(math.pi * i / steps))
        factors = jax.tree.map(
            lambda a, rate, u: a - rate * share * u, state.factors, rates, updates
        )
        return _State(factors, optimizer, best, jnp.where(better, loss, state.lowest))

    return jax.lax.fori_loop(span[0], span[1], step, state)
