"""Optimizers that see matrices: Muon and Adafactor, by optax, one matrix of a stacked weight at a time.

Weights are stacked over layers, experts and the pair of gate and up projections: `[L, in, out]`, `[L, E, D,
2, F]`. An optimizer that looks at rows, columns or singular values must see each `[in, out]` alone, whatever
the mesh divides.

Sources: Muon: Jordan et al. 2024 (github.com/KellerJordan/Muon), scaled to AdamW's update size as in
  Moonlight (arXiv:2502.16982);
Adafactor: Shazeer & Stern 2018 (arXiv:1804.04235), with the options of transformers.optimization.Adafactor.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from optax.contrib import MuonDimensionNumbers

from deepseek_jax.config.options import OptimizerConfig
from deepseek_jax.parallel.mesh import per_device
from deepseek_jax.parallel.sharding import logical_axes

STACKED_AXES = (
    "layers",
    "experts",
    "some_experts",
    "pair",
)  # logical axes along which a weight holds matrices, or vectors, of their own
# root mean square of Muon's update of a matrix, as AdamW's usually is: both then take the same learning rate
# and weight decay
MUON_RMS = 0.2
LEAST_SCALE = 1e-3  # of a weight that Adafactor's learning rate is relative to
# elements of the matrices that a device orthogonalises at a time: 64 MiB in each of some five arrays; a
# larger matrix alone
CHUNK = 2**24


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


def muon_labels(params: nnx.State) -> Any:
    """ "muon" for the matrices of the layers, router included; "adamw" for norms, embedding and output head
    (as Moonlight's).
    """

    def label(v: nnx.Variable) -> nnx.Variable:
        axes = [name for name in logical_axes(v) if name not in STACKED_AXES]
        return v.replace("muon" if len(axes) == 2 and "vocab" not in axes else "adamw")

    return jax.tree.map(label, params, is_leaf=lambda v: isinstance(v, nnx.Variable))


def scale_by_muon(
    params: nnx.State, momentum: float, adamw: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised, for what `muon_labels` calls so; `adamw`, without learning rate and
    decay, for the rest.

    Momentum is `m = g + momentum * m`, and what is orthogonalised `g + momentum * m`: with the gradient's
    share (1 - momentum) of other implementations both are smaller by a factor, which orthogonalisation takes
    out.
    """
    stacked = stacked_dimensions(params)

    def update(updates, state, params=None):
        def of(s, u):
            return u if isinstance(u, optax.MaskedNode) else orthogonalised(u, s)

        return jax.tree.map(of, stacked, updates), state

    muon = optax.chain(
        optax.trace(momentum, nesterov=True),
        optax.GradientTransformation(lambda _: optax.EmptyState(), update),
    )
    return optax.partition({"muon": muon, "adamw": adamw}, muon_labels(params))


def orthogonalised(update: jax.Array, stacked: Stacked) -> jax.Array:
    """Every matrix of a stacked update with its singular values brought near 1, and scaled to the root mean
    square MUON_RMS.

    A matrix must be whole for that. Where the mesh divides its rows or columns, an all-to-all makes each of n
    devices hold some whole matrices instead of an n-th of each, and a second one brings the results back: as
    many bytes as the update has on the device, twice, and no device computes what another one does but for
    filling up the number of matrices to a multiple of n. It goes through them CHUNK by CHUNK. Over axes that
    do not divide the weight, all devices compute the same. 5 steps cost 5 (4 m^2 n + 2 m^3) FLOPs for a
    matrix of m <= n.

    Args:
      update: float32, in any layout. stacked: its dimensions that are not of a matrix.

    Returns:
      The same shape and layout.
    """
    spec = jax.typeof(update).sharding.spec

    def named(d):
        return () if spec[d] is None else (spec[d],) if isinstance(spec[d], str) else tuple(spec[d])

    (m, n), divided = zip(
        *((update.shape[d], named(d)) for d in range(update.ndim) if d not in stacked.dimensions),
        strict=True,
    )

    def one_chunk(matrices):
        for dimension, axes in enumerate(divided, 1):
            if axes:
                matrices = lax.all_to_all(
                    matrices, axes, split_axis=0, concat_axis=dimension, tiled=True
                )
        matrices = jax.vmap(_orthogonalised)(matrices) * (MUON_RMS * math.sqrt(max(m, n)))
        for dimension, axes in reversed(list(enumerate(divided, 1))):
            if axes:
                matrices = lax.all_to_all(
                    matrices, axes, split_axis=dimension, concat_axis=0, tiled=True
                )
        return matrices

    def one_device(u):
        u = stacked.first(u)
        matrices, ways = (
            u.reshape(-1, *u.shape[-2:]),
            math.prod(lax.axis_size(a) for axes in divided for a in axes),
        )
        count = len(matrices)
        steps = -(-count // (ways * max(1, CHUNK // (m * n))))
        size = -(-count // (ways * steps)) * ways
        matrices = jnp.pad(matrices, ((0, steps * size - count), (0, 0), (0, 0))).reshape(
            steps, size, *u.shape[-2:]
        )
        return stacked.back(
            lax.map(one_chunk, matrices).reshape(-1, *u.shape[-2:])[:count].reshape(u.shape)
        )

    return per_device(one_device, (spec,), spec)(update)


def _orthogonalised(matrix: jax.Array) -> jax.Array:
    """Newton-Schulz by optax: without momentum its Muon does nothing else."""
    muon = optax.contrib.scale_by_muon(
        beta=0.0, nesterov=False, weight_dimension_numbers=MuonDimensionNumbers(0, 1)
    )
    return muon.update(matrix, muon.init(matrix))[0]


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
