"""Adafactor, by optax, one matrix of a stacked weight at a time, with the options of
transformers.optimization.Adafactor.

Source: Shazeer & Stern 2018 (arXiv:1804.04235).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from deepseek_jax.config.options import OptimizerConfig
from deepseek_jax.train.stacked import Stacked, stacked_dimensions

LEAST_SCALE = 1e-3  # of a weight that Adafactor's learning rate is relative to


def adafactor(
    options: OptimizerConfig, params: nnx.State, rate: optax.Schedule, mask: Any
) -> optax.GradientTransformation:
    """Adafactor whole. With `scale_parameter` the weight decay of a matrix is relative to its root mean
    square, as its learning rate is; with `first_moment` a mean of the updates, learning rate among them, is
    applied in their place, and the decay beside it.

    Args:
      params: they give structure and logical axes only.
      rate: the learning rate of an update. mask: True for each weight that is decayed.
    """
    o = options
    scale = scale_by_adafactor(params, o)
    if o.scale_parameter and o.weight_decay:
        decay = add_relative_decay(params, o.weight_decay, mask)
    else:
        decay = optax.add_decayed_weights(o.weight_decay, mask)
    if o.first_moment:
        return optax.chain(scale, with_first_moment(o.first_moment, rate, decay))
    return optax.chain(scale, decay, optax.scale_by_learning_rate(rate))


def add_relative_decay(
    params: nnx.State, weight_decay: float, mask: Any
) -> optax.GradientTransformation:
    """Adds the decay of each matrix times its root mean square, which is taken for LEAST_SCALE at least."""
    stacked, decayed = jax.tree.leaves(stacked_dimensions(params)), jax.tree.leaves(mask)

    def update(updates, state, params):
        def of_one(u, p):
            rms = jnp.sqrt(jnp.mean(jnp.square(p)))
            return u + weight_decay * jnp.maximum(rms, LEAST_SCALE) * p

        leaves, tree = jax.tree.flatten(updates)
        triples = zip(stacked, decayed, leaves, jax.tree.leaves(params), strict=True)
        out = [
            s.back(s.each(of_one)(s.first(u), s.first(p))) if chosen else u
            for s, chosen, u, p in triples
        ]
        return jax.tree.unflatten(tree, out), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


class FirstMoment(NamedTuple):
    """Attributes:
    schedule: how many updates there were. mean: of the updates, float32, in the weights' shapes.
    """

    schedule: optax.ScaleByScheduleState
    mean: Any


def with_first_moment(
    b1: float, rate: optax.Schedule, decay: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The last part of an optimizer: -(mean of lr * update, and lr * decay).

    Args:
      decay: without state, adds the weight decay to updates.
    """

    def init(params):
        count = optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))
        return FirstMoment(count, jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params):
        lr, count = rate(state.schedule.count), optax.safe_increment(state.schedule.count)
        mean = jax.tree.map(lambda m, u: b1 * m + (1 - b1) * lr * u, state.mean, updates)
        zeros = jax.tree.map(jnp.zeros_like, updates)
        decayed, _ = decay.update(zeros, decay.init(params), params)
        out = jax.tree.map(lambda m, d: -(m + lr * d), mean, decayed)
        return out, FirstMoment(optax.ScaleByScheduleState(count), mean)

    return optax.GradientTransformation(init, update)


def scale_by_adafactor(params: nnx.State, options: OptimizerConfig) -> optax.GradientTransformation:
    """Adafactor's update, without momentum, learning rate and decay: for each matrix or vector of a stacked
    weight by itself.

    The state is optax's FactoredState: v_row and v_col have a weight's stacked dimensions first, then the one
    that is left; v is that of weights too small to be factored. What a weight has no use for is one zero a
    matrix.
    """
    parts = [
        optax.scale_by_factored_rms(min_dim_size_to_factor=options.min_dim_size_to_factor),
        optax.clip_by_block_rms(options.clip_threshold),
    ]
    if options.scale_parameter:
        parts.append(optax.scale_by_param_block_rms(LEAST_SCALE))
    one = optax.chain(*parts)
    stacked = jax.tree.leaves(stacked_dimensions(params))

    def state_of(count, statistics, tree):
        return optax.FactoredState(
            count, *(jax.tree.unflatten(tree, s) for s in zip(*statistics, strict=True))
        )

    def init(params):
        leaves, tree = jax.tree.flatten(params)

        def of_one(p):
            return tuple(one.init(p)[0])[1:]

        statistics = [
            jax.tree.map(functools.partial(_divided_as, s, s.first(p)), s.each(of_one)(s.first(p)))
            for s, p in zip(stacked, leaves, strict=True)
        ]
        return state_of(jnp.zeros((), jnp.int32), statistics, tree)

    def update(updates, state, params):
        def of_one(g, p, *statistics):
            others = (optax.EmptyState(),) * (len(parts) - 1)
            new, (factored, *_) = one.update(
                g, (optax.FactoredState(state.count, *statistics), *others), p
            )
            return new, tuple(factored)[1:]

        leaves, tree = jax.tree.flatten(updates)
        rest = (jax.tree.leaves(t) for t in (params, state.v_row, state.v_col, state.v))
        out, statistics = [], []
        for s, g, p, *old in zip(stacked, leaves, *rest, strict=True):
            new, kept = s.each(of_one)(s.first(g), s.first(p), *old)
            out.append(s.back(new))
            statistics.append(kept)
        return jax.tree.unflatten(tree, out), state_of(
            optax.safe_increment(state.count), statistics, tree
        )

    return optax.GradientTransformation(init, update)


def _divided_as(stacked: Stacked, weight: jax.Array, statistic: jax.Array) -> jax.Array:
    """A statistic with its stacked dimensions in the layout of the weight's, which a constant has only where
    a mesh is set.
    """
    count = len(stacked.dimensions)
    of_weight, own = ((*jax.typeof(a).sharding.spec, *[None] * a.ndim) for a in (weight, statistic))
    if of_weight[:count] == own[:count]:
        return statistic
    wanted = jax.P(*of_weight[:count], *own[count : statistic.ndim])
    return jax.sharding.reshard(
        statistic, jax.NamedSharding(jax.typeof(weight).sharding.mesh, wanted)
    )
