"""Arrays in the host's memory: which they are, and work on stacked ones that brings one layer at a time to
the device.

Under jit an array's memory is part of its type, next to shape and sharding. Nothing may compute on one in the
host's memory: XLA would do so there, slowly, or refuse. So what reads or writes such arrays is here, but for
the model's scan over layers, which calls `to_device`. All of it leaves arrays on the device as they are.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from deepseek_jax.config.options import Config

HOST = (
    "pinned_host"  # memory kind: what a GPU copies from and to without going through other memory
)
STACKS = ("layers", "dense_layers")  # first names of parameters with a leading axis of layers


def is_stack(path: tuple) -> bool:
    """Whether a path in a tree of parameters leads to a stack of layers."""
    return jax.tree_util.keystr(path[:1], simple=True) in STACKS


def place_params(config: Config, shardings: Any) -> Any:
    """The shardings of parameters in the memory that `config.offload.parameters` gives them.

    Embedding, output head, last norm and the layers of multi-token prediction stay on the device.
    """
    if not config.offload.parameters:
        return shardings
    return jax.tree_util.tree_map_with_path(
        lambda path, s: s.with_memory_kind(HOST) if is_stack(path) else s, shardings
    )


def place_optimizer(config: Config, abstract: Any, shardings: Any) -> Any:
    """The shardings of an optimizer's state (`abstract`: its shapes) in the memory that
    `config.offload.optimizer_state` gives it.

    Counters stay on the device.
    """
    if not config.offload.optimizer_state:
        return shardings
    return jax.tree.map(lambda a, s: s.with_memory_kind(HOST) if a.ndim else s, abstract, shardings)


def on_host(a: Any) -> bool:
    """Whether an array is in the host's memory; under jit, by its type."""
    return jax.typeof(a).memory_space == jax.memory.Space.Host


def put(a: jax.Array, like: Any) -> jax.Array:
    """An array in the memory of another; under jit."""
    return a if on_host(a) == on_host(like) else jax.device_put(a, jax.typeof(like).memory_space)


def to_device(tree: Any) -> Any:
    """The tree on the device; under jit. Its cotangents go to where the arrays were."""
    return jax.tree.map(
        lambda a: jax.device_put(a, jax.memory.Space.Device) if on_host(a) else a, tree
    )


def to(tree: Any, shardings: Any) -> Any:
    """The tree in the memory of these shardings; under jit."""

    def move(a: jax.Array, s: Any) -> jax.Array:
        return jax.device_put(a, jax.memory.Space.Host) if s.memory_kind == HOST else a

    return jax.tree.map(move, tree, shardings)


def over_layers(f: Callable, stacks: Any, *read: Any) -> Any:
    """f of one layer after the other, written over the stacks, so that neither memory ever holds them twice.

    Args:
      f: (stacks, *read), on the device and of one layer, [1, ...] -> the new stacks.
      stacks: arrays [L, ...] in either memory, and scalars, which come out as they were. read: likewise.
    """
    layers = next(a.shape[0] for a in jax.tree.leaves(stacks) if a.ndim)

    def take(tree, i):
        one = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, i, 1) if a.ndim else a, tree)
        return to_device(one)

    def write(a, new, i):
        return lax.dynamic_update_slice_in_dim(a, put(new, a), i, 0) if a.ndim else a

    def step(stacks, i):
        new = f(take(stacks, i), *(take(tree, i) for tree in read))
        return jax.tree.map(lambda a, n: write(a, n, i), stacks, new), None

    return lax.scan(step, stacks, jnp.arange(layers))[0]


def tree_map(f: Callable, tree: Any, *rest: Any) -> Any:
    """jax.tree.map of an elementwise f; what it makes of a stack in the host's memory is written over that
    stack, with its dtype.
    """
    leaves, structure = jax.tree.flatten(tree)
    columns = [leaves, *(jax.tree.leaves(t) for t in rest)]
    out = [None if on_host(a) else f(a, *others) for a, *others in zip(*columns, strict=True)]
    for layers in sorted({a.shape[0] for a in leaves if on_host(a)}):
        chosen = [i for i, a in enumerate(leaves) if on_host(a) and a.shape[0] == layers]
        new = over_layers(
            lambda *trees: jax.tree.map(f, *trees),
            *([column[i] for i in chosen] for column in columns),
        )
        for i, a in zip(chosen, new, strict=True):
            out[i] = a
    return jax.tree.unflatten(structure, out)


def zeros(shapes: Any, shardings: Any) -> Any:
    """Zeros of these shapes, dtypes and PartitionSpecs, in the memory of `shardings`."""

    def one(shape, sharding):
        def of(dims, spec):
            return jnp.zeros(dims, shape.dtype, out_sharding=spec)

        if sharding.memory_kind != HOST:
            return of(shape.shape, shape.sharding.spec)

        def layer(_, __):
            return (
                None,
                jax.device_put(
                    of(shape.shape[1:], jax.P(*shape.sharding.spec[1:])), jax.memory.Space.Host
                ),
            )

        return lax.scan(layer, None, length=shape.shape[0])[1]

    return jax.tree.map(one, shapes, shardings)


def norm(tree: Any) -> jax.Array:
    """optax.tree.norm: the root of the sum of all squares, float32."""
    leaves = jax.tree.leaves(tree)
    stacks = [a for a in leaves if on_host(a)]
    if not stacks:
        return optax.tree.norm(tree)
    total = optax.tree.norm([a for a in leaves if not on_host(a)], squared=True)
    for layers in sorted({a.shape[0] for a in stacks}):
        same = [a for a in stacks if a.shape[0] == layers]

        def of_layer(total, layer):
            return (
                total + optax.tree.norm(to_device(layer), squared=True),
                None,
            )

        total = lax.scan(of_layer, total, same)[0]
    return jnp.sqrt(total)
