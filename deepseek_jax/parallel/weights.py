"""How a weight gets from its layout in storage to the layer that uses it, and its gradient back.

Outside of `per_device`, `whole` moves a weight to its compute layout: the all-gather of FULL_SHARD, one layer at a time. Inside,
`gathered` does so for one device. Either way the gradient goes back by the transpose, a reduce-scatter. `PerReplica` leaves out of it the
sum over replicas.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from deepseek_jax.parallel.mesh import BATCH_AXES
from deepseek_jax.parallel.sharding import COMPUTE_RULES, logical_axes, spec, without_stage

REPLICAS = "data"  # the axis along which the strategies that do not divide over it have replicas
WEIGHTS = "weights"  # checkpoint_name of weights as they are used: never kept for the backward pass, which gathers them again


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
    """A weight that every device keeps whole while its gradient is divided (SHARD_GRAD_OP): the value of a variable in place of an array.

    Using it moves nothing, but its gradient goes to the layout of `part` where it arises, layer by layer. An array cannot say
    that: its gradient has its own layout, so it would be summed up whole on every device, for all layers, and sliced afterwards.
    """

    whole: jax.Array  # what is used
    part: jax.Array  # the same numbers in the layout of the gradient: what is differentiated

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.shape

    @property
    def ndim(self) -> int:
        return self.whole.ndim


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerReplica:
    """A weight of which every replica along `data` has its own copy, and so its own gradient: the value of a variable in place of an array.

    A copy is the replica's own shards of the weight, so it takes no memory and moves nothing. The sum of the gradients over
    replicas is left to parallel/compression.py.
    """

    copies: jax.Array  # [R, ...], divided over `data`; [L, R, ...] of stacked layers, until a scan takes one of them

    @property
    def ndim(self) -> int:
        return self.copies.ndim - 1


def copies(params: nnx.State, replicas: int) -> nnx.State:
    """Every parameter once for each replica along `data`, [R, ...]: what gradients are taken of."""

    def copy(w: jax.Array) -> jax.Array:
        out = P(REPLICAS, *jax.typeof(w).sharding.spec)
        return lax.broadcast_in_dim(w, (replicas, *w.shape), range(1, w.ndim + 1), out_sharding=out)

    return jax.tree.map(copy, params)


def each_its_own(copies: nnx.State) -> nnx.State:
    """Parameters as they are used, from `copies`."""

    def value(v: nnx.Variable) -> nnx.Variable:
        w = v.get_value()
        return v.replace(
            PerReplica(
                jax.numpy.moveaxis(w, 0, 1)
                if v.get_metadata()["out_sharding"][0] == "layers"
                else w
            )
        )

    return jax.tree.map(value, copies, is_leaf=lambda v: isinstance(v, nnx.Variable))


def keep_whole(params: nnx.State, parts: nnx.State) -> nnx.State:
    """Parameters as they are used: `Kept` where the layout of `parts`, their gradients', differs from their own; else the part itself."""

    def pair(whole: jax.Array, part: jax.Array) -> Any:
        same = jax.typeof(whole).sharding.spec == jax.typeof(part).sharding.spec
        return part if same else Kept(lax.stop_gradient(whole), part)

    return jax.tree.map(pair, params, parts)


def whole(variable: nnx.Variable, dtype: Any) -> jax.Array:
    """The weight as the layer uses it: cast to the compute dtype, then gathered, so that the gather moves few bytes.

    With a leading axis of replicas if it is `PerReplica`.
    """
    target, w = spec(logical_axes(variable), COMPUTE_RULES), variable.get_value()
    if isinstance(w, PerReplica):
        return checkpoint_name(
            jax.sharding.reshard(w.copies.astype(dtype), P(REPLICAS, *target)), WEIGHTS
        )
    gather = lambda w: jax.sharding.reshard(w.astype(dtype), target)
    return checkpoint_name(
        _used(gather, w.part, gather(w.whole)) if isinstance(w, Kept) else gather(w), WEIGHTS
    )


def applied(
    f: Callable[[jax.Array, jax.Array], jax.Array], variable: nnx.Variable, dtype: Any, x: jax.Array
) -> jax.Array:
    """f(x, the whole weight) for x [B, ...]; if the weight is `PerReplica`, each replica's rows with its own copy."""
    w = whole(variable, dtype)
    if not isinstance(variable.get_value(), PerReplica):
        return f(x, w)
    replicas, (batch, *rest) = w.shape[0], jax.typeof(x).sharding.spec
    within = tuple(
        a for a in batch if a != REPLICAS
    )  # `data` is the outermost of the batch axes: no row moves
    by_replica = lax.reshape(
        x, (replicas, x.shape[0] // replicas, *x.shape[1:]), out_sharding=P(REPLICAS, within, *rest)
    )
    y = jax.vmap(f)(by_replica, w)
    return lax.reshape(
        y, (x.shape[0], *y.shape[2:]), out_sharding=P(batch, *jax.typeof(y).sharding.spec[2:])
    )


def stored(variable: nnx.Variable) -> tuple[list[jax.Array], list[P]]:
    """The arrays of a variable, one or two, and their specs: to be handed to `per_device`, and there to `gathered`."""
    w = variable.get_value()
    arrays = [jax.sharding.reshard(a, without_stage(a)) for a in _arrays(w)]
    return arrays, [jax.typeof(a).sharding.spec for a in arrays]


def _arrays(w: Any) -> list[jax.Array]:
    if isinstance(w, PerReplica):
        return [w.copies]
    return [w.part, w.whole] if isinstance(w, Kept) else [w]


def gathered(arrays: list[jax.Array], specs: list[P], dtype: Any) -> jax.Array:
    """Inside `per_device`, a weight given as `stored`: this device's experts, heads or words, else whole; varying over all batch axes."""
    gather = lambda w, spec: _all_gather(w.astype(dtype), spec)
    if specs[0][0] == REPLICAS:  # no spec of a whole weight begins with this axis alone
        w = _all_gather(arrays[0][0].astype(dtype), specs[0][1:], held=(REPLICAS,))
    elif len(arrays) == 1:
        w = gather(arrays[0], specs[0])
    else:
        w = _used(lambda part: gather(part, specs[0]), arrays[0], gather(arrays[1], specs[1]))
    return checkpoint_name(w, WEIGHTS)


def _all_gather(w: jax.Array, spec: P, held: tuple[str, ...] = ()) -> jax.Array:
    """`held`: axes that w varies over already, besides those of its spec."""
    named = [
        (d, (axes,) if isinstance(axes, str) else tuple(axes))
        for d, axes in enumerate(spec)
        if axes
    ]
    held = {*held, *(a for _, axes in named for a in axes)}
    # Before the gathers, so that in backward sums over these axes are of what is left after the reduce-scatter.
    if missing := tuple(a for a in BATCH_AXES if a not in held):
        w = lax.pcast(w, missing, to="varying")
    for dimension, axes in named:
        kept = axes in (
            ("expert",),
            ("tensor",),
        )  # divided in use too; where `expert` divides dense weights, it is with others
        if (
            not kept and lax.axis_size(axes) > 1
        ):  # of one device, it would only give the weight a layout that others must copy
            w = lax.all_gather(w, axes, axis=dimension, tiled=True)
    return w


def _used(gather: Callable, part: jax.Array, whole: jax.Array) -> jax.Array:
    """`whole`, whose gradient goes to `part` by the transpose of `gather`."""

    @jax.custom_vjp
    def use(part, whole):
        return whole

    use.defvjp(
        lambda part, whole: (whole, part),
        lambda part, cotangent: (jax.vjp(gather, part)[1](cotangent)[0], None),
    )
    return use(part, whole)
