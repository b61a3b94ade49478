"""How a weight gets from its layout in storage to the layer that uses it, and its gradient back.

A parameter is the value of an nnx.Variable, in one of several representations, chosen by train/gradients.py:

    value             when                                 its gradient
    jax.Array         stored as its gradient is            in the layout of the array
    ReplicatedWeight  SHARD_GRAD_OP, ZeRO-1: stored whole, in the layout of `part`: a reduce-scatter where it
                      gradient divided                     arises, layer by layer
    PerReplicaWeight  gradient_compression                 each replica's own, [R, ...]; compression.py sums
    SomeExperts       esft: of a layer's experts some      of those alone, in the layout of their own stack
                      learn
    QuantizedWeight   frozen, in 8 or 4 bits               none; they travel as they are held (quantized.py)

A layer uses any of them in one of two ways. The gradient goes back by the transpose, a reduce-scatter:

    where                 how                               what
    outside `per_device`  gather_for_use(variable) or       norms, linear maps, the router: the all-gather
                          apply_weight(f, variable, ...)    of FULL_SHARD, one layer at a time
    inside `per_device`   stored_arrays(variable) outside,  experts, embedding, output head: this device's
                          gather_on_device(arrays) inside,  experts, heads or words, else the whole weight
                          or gather_rounded(arrays)
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from deepseek_jax.parallel import expert_rows
from deepseek_jax.parallel.mesh import TOKEN_AXES
from deepseek_jax.parallel.quantized import QuantizedWeight, dequantized, is_quantized
from deepseek_jax.parallel.sharding import COMPUTE_RULES, logical_axes, spec, without_stage

REPLICAS = "data"  # the axis along which the strategies that do not divide over it have replicas
# checkpoint_name of weights as they are used: never kept for the backward pass, which gathers them again
WEIGHTS = "weights"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReplicatedWeight:
    """A weight that every device holds whole while its gradient is divided: the value of a variable in place
    of an array.

    Using it moves nothing, but its gradient goes to the layout of `part` where it arises, layer by layer. An
    array cannot say that: its gradient has its own layout, so it would be summed up whole on every device,
    for all layers, and sliced afterwards.
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
class PerReplicaWeight:
    """A weight of which every replica along `data` has its own copy, and so its own gradient: the value of a
    variable in place of an array.

    A copy is the replica's own shards of the weight, so it takes no memory and moves nothing.
    """

    # [R, ...], divided over `data`; [L, R, ...] of stacked layers, until a scan takes one of them
    copies: jax.Array

    @property
    def ndim(self) -> int:
        return self.copies.ndim - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SomeExperts:
    """The experts of a layer, of which some learn: the value of a variable in place of an array.

    What is used is `whole`, where those that learn are up to date; their gradient goes to their stack.
    """

    whole: jax.Array  # [E, ...]: all experts
    part: Any  # jax.Array [N, ...] or PerReplicaWeight: those that learn, what is differentiated
    index_N: jax.Array  # int32: which they are (expert_rows.py)

    @property
    def ndim(self) -> int:
        return self.whole.ndim


def copy_per_replica(params: nnx.State, replicas: int) -> nnx.State:
    """Every parameter once for each replica along `data`, [R, ...]: what gradients are taken of."""

    def copy(w: jax.Array) -> jax.Array:
        out = P(REPLICAS, *jax.typeof(w).sharding.spec)
        return lax.broadcast_in_dim(w, (replicas, *w.shape), range(1, w.ndim + 1), out_sharding=out)

    return jax.tree.map(copy, params)


def per_replica_weights(copies: nnx.State) -> nnx.State:
    """Parameters as they are used, `PerReplicaWeight`s, from `copy_per_replica`."""

    def value(v: nnx.Variable) -> nnx.Variable:
        w = v.get_value()
        stacked = v.get_metadata()["out_sharding"][0] == "layers"
        return v.replace(PerReplicaWeight(jnp.moveaxis(w, 0, 1) if stacked else w))

    return jax.tree.map(value, copies, is_leaf=lambda v: isinstance(v, nnx.Variable))


def replicated_weights(params: nnx.State, parts: nnx.State) -> nnx.State:
    """Parameters as they are used.

    Args:
      parts: the same parameters in the layout of their gradients.

    Returns:
      `ReplicatedWeight`s where the two layouts differ, else the part itself.
    """

    def pair(whole: jax.Array, part: jax.Array) -> Any:
        same = jax.typeof(whole).sharding.spec == jax.typeof(part).sharding.spec
        return part if same else ReplicatedWeight(lax.stop_gradient(whole), part)

    return jax.tree.map(pair, params, parts)


def gather_for_use(variable: nnx.Variable, dtype: Any) -> jax.Array:
    """The weight as a layer uses it: cast to the compute dtype, then gathered, so that the gather moves few
    bytes.

    With a leading axis of replicas if it is a `PerReplicaWeight`.
    """
    axes, w = logical_axes(variable), variable.get_value()
    target = spec(axes, COMPUTE_RULES)

    def gather(w: jax.Array) -> jax.Array:
        return jax.sharding.reshard(w.astype(dtype), target)

    if isinstance(w, PerReplicaWeight):
        used = jax.sharding.reshard(w.copies.astype(dtype), P(REPLICAS, *target))
    elif isinstance(w, ReplicatedWeight):
        used = _with_gradient_of(gather, w.part, gather(w.whole))
    elif isinstance(w, QuantizedWeight):
        used = dequantized(
            [
                jax.sharding.reshard(part, spec(axes, COMPUTE_RULES))
                for part, axes in zip(w.parts, w.axes(axes), strict=True)
            ],
            dtype,
            target,
        )
    else:
        used = gather(w)
    return checkpoint_name(used, WEIGHTS)


def apply_weight(
    f: Callable[[jax.Array, jax.Array], jax.Array], variable: nnx.Variable, dtype: Any, x: jax.Array
) -> jax.Array:
    """f(x, the gathered weight) for x [B, ...]; of a `PerReplicaWeight` each replica's sequences with its own
    copy.
    """
    w = gather_for_use(variable, dtype)
    if not isinstance(variable.get_value(), PerReplicaWeight):
        return f(x, w)
    replicas, (batch, *rest) = w.shape[0], jax.typeof(x).sharding.spec
    # `data` is the outermost of the batch axes: no sequence moves.
    within = tuple(a for a in batch if a != REPLICAS)
    by_replica = lax.reshape(
        x, (replicas, x.shape[0] // replicas, *x.shape[1:]), out_sharding=P(REPLICAS, within, *rest)
    )
    y = jax.vmap(f)(by_replica, w)
    return lax.reshape(
        y, (x.shape[0], *y.shape[2:]), out_sharding=P(batch, *jax.typeof(y).sharding.spec[2:])
    )


def stored_arrays(variable: nnx.Variable) -> tuple[list[jax.Array], list[P]]:
    """The arrays of a variable, one or several, and their specs: to be handed to `per_device`, and there to
    `gather_on_device`.
    """
    w = variable.get_value()
    arrays = [jax.sharding.reshard(a, without_stage(a)) for a in _arrays(w)]
    return arrays, [jax.typeof(a).sharding.spec for a in arrays]


def _arrays(w: Any) -> list[jax.Array]:
    if isinstance(w, PerReplicaWeight):
        return [w.copies]
    if isinstance(w, QuantizedWeight):
        return w.parts
    if isinstance(w, SomeExperts):
        return [*_arrays(w.part), w.whole, w.index_N]
    return [w.part, w.whole] if isinstance(w, ReplicatedWeight) else [w]


def gather_on_device(arrays: Sequence[jax.Array], specs: list[P], dtype: Any) -> jax.Array:
    """Inside `per_device`, a weight given as `stored_arrays`: this device's experts, heads or words, else
    whole; varying over TOKEN_AXES.
    """

    def gather(w: jax.Array, spec: P) -> jax.Array:
        return _all_gather(w.astype(dtype), spec)

    if is_quantized(arrays):
        parts = [_all_gather(a, s) for a, s in zip(arrays, specs, strict=True)]
        w = dequantized(parts, dtype)
    elif len(arrays) == 3:  # SomeExperts
        all_experts = gather(arrays[1], specs[1])

        def among_all(part: jax.Array, index_N: jax.Array) -> jax.Array:
            rows = gather_on_device([part], specs[:1], dtype)
            return expert_rows.among_all(rows, index_N, all_experts.shape[0])

        w = _with_gradient_of(among_all, arrays[0], all_experts, arrays[2])
    elif specs[0][0] == REPLICAS:  # no spec of a whole weight begins with this axis alone
        w = _all_gather(arrays[0][0].astype(dtype), specs[0][1:], held=(REPLICAS,))
    elif len(arrays) == 1:
        w = gather(arrays[0], specs[0])
    else:
        w = _with_gradient_of(
            lambda part: gather(part, specs[0]), arrays[0], gather(arrays[1], specs[1])
        )
    return checkpoint_name(w, WEIGHTS)


def gather_rounded(arrays: Sequence[jax.Array], specs: list[P], dtype: Any) -> jax.Array:
    """As `gather_on_device` in float32, of numbers rounded to `dtype`, in which they travel: for weights of
    which a gradient is a sum of many, which stays float32 on its way back too.
    """
    if is_quantized(arrays) or arrays[0].dtype != jnp.float32 or dtype == jnp.float32:
        return gather_on_device(arrays, specs, jnp.float32)

    def gather(part: jax.Array) -> jax.Array:
        return gather_on_device([part], specs[:1], jnp.float32)

    rounded = gather_on_device(lax.stop_gradient(arrays), specs, dtype).astype(jnp.float32)
    return checkpoint_name(_with_gradient_of(gather, arrays[0], rounded), WEIGHTS)


def _all_gather(w: jax.Array, spec: P, held: tuple[str, ...] = ()) -> jax.Array:
    """`held`: axes that w varies over already, besides those of its spec."""
    named = [
        (d, (axes,) if isinstance(axes, str) else tuple(axes))
        for d, axes in enumerate(spec)
        if axes
    ]
    varies = {*held, *(a for _, axes in named for a in axes)}
    # Before the gathers, so that in backward sums over these axes are of what is left after the
    # reduce-scatter.
    if missing := tuple(a for a in TOKEN_AXES if a not in varies):
        w = lax.pcast(w, missing, to="varying")
    for dimension, axes in named:
        # Experts and the tensor axis are divided in use too. They are the outermost of several, so that their
        # part stays in one piece; where `expert` divides dense weights, it is not.
        axes = axes[1:] if axes[0] in ("tensor", "expert") else axes
        # A gather over one device would only give the weight a layout that others must copy.
        if axes and lax.axis_size(axes) > 1:
            w = lax.all_gather(w, axes, axis=dimension, tiled=True)
    return w


def _with_gradient_of(
    gather: Callable, part: jax.Array, whole: jax.Array, *given: jax.Array
) -> jax.Array:
    """`whole`, whose gradient goes to `part` by the transpose of `gather`, a function of it and `given`."""

    @jax.custom_vjp
    def use(part, whole, *given):
        return whole

    def forward(part, whole, *given):
        return whole, (part, given)

    def backward(residuals, cotangent):
        part, given = residuals
        found = jax.vjp(lambda part: gather(part, *given), part)[1](cotangent)
        return (*found, None, *[None] * len(given))

    use.defvjp(forward, backward)
    return use(part, whole, *given)
