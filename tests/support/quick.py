"""Programs of tests, compiled in a hurry: compiling is most of what the tests do."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from deepseek_jax.config.options import Config


@functools.cache
def quick_options(float32: bool = False) -> dict[str, Any]:
    """XLA options, as far as this XLA knows them, that compile quickly: conftest.py's, for programs
    without it.

    Args:
      float32: the program has no narrower floats. Then fused loops may be emitted the older way,
        which compiles in half of the time; in one program of bfloat16 that wrote outside of its
        arrays.
    """
    known = {}
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    wanted = quick | ({"xla_cpu_use_fusion_emitters": False} if float32 else {})
    for name, value in wanted.items():
        try:
            jax.jit(lambda: jnp.zeros(()), compiler_options={name: value}).lower().compile()
            known[name] = value
        except jax.errors.JaxRuntimeError:
            pass
    return known


def options_of(config: Config) -> dict[str, Any]:
    """quick_options for the run of a config: `float32` where it has nothing narrower."""
    c = config
    dtypes = (
        c.train.dtype,
        c.train.accumulation_dtype,
        c.optimizer.moment_dtype,
        c.sharding.gradient_compression,
    )
    return quick_options(set(dtypes) <= {"float32", "none"})


def _is_narrow(jaxpr: Any) -> bool:
    """Whether a program has numbers narrower than 32 bits; bools are none."""
    if isinstance(jaxpr, ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    for v in (*jaxpr.invars, *jaxpr.constvars, *(v for e in jaxpr.eqns for v in e.outvars)):
        dtype = getattr(v.aval, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jnp.number) and dtype.itemsize < 4:
            return True
    inner = jax.tree.leaves([list(e.params.values()) for e in jaxpr.eqns])
    return any(_is_narrow(j) for j in inner if isinstance(j, ClosedJaxpr | Jaxpr))


class Quick:
    """A jitted function that is compiled as quickly as the dtypes of its program allow."""

    def __init__(self, f: Callable, **options: Any):
        self._f, self._options = f, options
        self._plain = jax.jit(f, **options)
        self._chosen: dict[Any, Any] = {}  # by all that dtypes can depend on

    def _of(self, args: tuple, kwargs: dict) -> Any:
        leaves = jax.tree.leaves((args, kwargs))
        key = tuple(getattr(a, "dtype", str(a)) for a in leaves)
        if key not in self._chosen:
            traced = self._plain.trace(*args, **kwargs)  # once: JAX keeps it for the other jit
            quick = quick_options(not _is_narrow(traced.jaxpr))
            self._chosen[key] = jax.jit(self._f, compiler_options=quick, **self._options)
        return self._chosen[key]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._of(args, kwargs)(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        return self._of(args, kwargs).lower(*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        return self._of(args, kwargs).trace(*args, **kwargs)


def jit(f: Callable, config: Config | None = None, **options: Any) -> Any:
    """jax.jit, compiled quickly; more so where nothing is narrower than float32, in `config`, of the run
    that `f` is of, or without one in the program."""
    if config is None:
        return Quick(f, **options)
    return jax.jit(f, compiler_options=options_of(config), **options)
