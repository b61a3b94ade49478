"""Programs of tests, compiled in a hurry: compiling is most of what the tests do."""

import functools
import importlib
import re
from typing import Any

import jax
import jax.numpy as jnp

# Floats narrower than 32 bits in a program's text.
_NARROW = re.compile(r"[<x](?:bf16|f(?:16|[468]E\w+))>")
_OPTION = "xla_cpu_use_fusion_emitters"


@functools.cache
def older_loops() -> dict[str, bool]:
    """The XLA option by which fused loops are emitted the older way, which compiles in half of the time; in
    one program of bfloat16 that wrote outside of its arrays. Nothing where this XLA does not know it."""
    option = {_OPTION: False}
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options=option).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return option


def compile_quickly() -> None:
    """Has JAX compile by `older_loops` what this process compiles for CPUs from now on and what has no
    floats narrower than 32 bits.

    JAX has no setting for it: an option of XLA is of the whole process, by XLA_FLAGS, or of one jit.
    Where JAX compiles otherwise than in 0.10.2 to 0.12 the tests take longer.
    """
    compiler: Any = importlib.import_module("jax._src.compiler")
    compile_ = getattr(compiler, "compile_or_get_cached", None)
    if compile_ is None:
        return

    def quickly(backend, computation, devices, compile_options, *args, **kwargs):
        overrides = compile_options.env_option_overrides
        is_chosen = any(name == _OPTION for name, _ in overrides)
        if backend.platform == "cpu" and not is_chosen and not is_narrow(computation):
            compile_options.env_option_overrides = [*overrides, *older_loops().items()]
        return compile_(backend, computation, devices, compile_options, *args, **kwargs)

    compiler.compile_or_get_cached = quickly


def is_narrow(computation: Any) -> bool:
    """Whether a program, an MLIR module, has floats narrower than 32 bits."""
    return bool(_NARROW.search(computation.operation.get_asm(large_elements_limit=4)))
