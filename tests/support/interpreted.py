"""Pallas kernels, interpreted inside shard_map.

Pallas' interpreter mixes values that say over which mesh axes they vary with others that do not, which
shard_map refuses. So a kernel is one primitive there, whose results vary over what its arguments vary over,
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
from deepseek_jax.model.attention import fused

_kernel_p = Primitive("interpreted_kernel")
_kernel_p.multiple_results = True


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """A context in which the kernels of experts/grouped_matmul.py and of model/attention/fused.py are
    interpreted in this way."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (grouped_matmul, fused):
            patch.setattr(module, "_call", _as_a_primitive(module._call))
        yield


def _as_a_primitive(original: Any) -> Any:
    def call(kernel, method, like, *args):
        leaves, tree = jax.tree.flatten(args)

        def interpret(*leaves: jax.Array) -> list[jax.Array]:
            found = original(kernel, method, like, *jax.tree.unflatten(tree, leaves))
            return jax.tree.leaves(found)

        shapes, results = jax.tree.flatten(like)
        found = _kernel_p.bind(*leaves, interpret=interpret, like=tuple(shapes))
        return jax.tree.unflatten(results, found)

    return call


@_kernel_p.def_abstract_eval
def _(*avals: Any, interpret, like) -> Any:
    varying = max(avals, key=lambda a: len(a.manual_axis_type.varying))

    def result(a):
        sharding = varying.sharding.update(spec=jax.P(*[None] * len(a.shape)))
        return varying.update(shape=a.shape, dtype=a.dtype, sharding=sharding, weak_type=False)

    return [result(a) for a in like]


def _lower(ctx, *args, interpret, like):
    def plain(aval: Any) -> Any:
        return aval.update(manual_axis_type=type(aval.manual_axis_type)())

    inner = ctx.replace(
        avals_in=[plain(a) for a in ctx.avals_in], avals_out=[plain(a) for a in ctx.avals_out]
    )
    return mlir.lower_fun(interpret, multiple_results=True)(inner, *args)


mlir.register_lowering(_kernel_p, _lower)
