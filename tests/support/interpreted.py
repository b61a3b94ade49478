"""Pallas kernels, interpreted inside shard_map.

Pallas' interpreter mixes values that say over which mesh axes they vary with others that do not, which
shard_map refuses. So a kernel is one primitive there, whose result varies over what its arguments vary over,
and is interpreted when that is lowered, of arrays that say nothing.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir

from deepseek_jax.experts import grouped_matmul

_kernel_p = Primitive("interpreted_kernel")


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """A context in which the kernels of experts/grouped_matmul.py are interpreted in this way."""
    original = grouped_matmul._call

    def call(kernel, method, like, *args):
        leaves, tree = jax.tree.flatten(args)

        def interpret(*leaves: jax.Array) -> jax.Array:
            return original(kernel, method, like, *jax.tree.unflatten(tree, leaves))

        return _kernel_p.bind(*leaves, interpret=interpret, like=like)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped_matmul, "_call", call)
        yield


@_kernel_p.def_abstract_eval
def _(*avals: Any, interpret, like) -> Any:
    varying = max(avals, key=lambda a: len(a.manual_axis_type.varying))
    sharding = varying.sharding.update(spec=jax.P(*[None] * len(like.shape)))
    return varying.update(shape=like.shape, dtype=like.dtype, sharding=sharding, weak_type=False)


def _lower(ctx, *args, interpret, like):
    def plain(aval: Any) -> Any:
        return aval.update(manual_axis_type=type(aval.manual_axis_type)())

    inner = ctx.replace(
        avals_in=[plain(a) for a in ctx.avals_in], avals_out=[plain(a) for a in ctx.avals_out]
    )
    return mlir.lower_fun(interpret, multiple_results=False)(inner, *args)


mlir.register_lowering(_kernel_p, _lower)
